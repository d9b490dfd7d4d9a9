"""What the pre-flight reports: its findings, and what it counted and predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.data.findings import Finding
from luthier.errors import UserError


@dataclass(slots=True)
class Preflight:
    """The whole report."""

    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts and predictions: rows, tokens, steps, memory, disk, first loss."""
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]

    @property
    def passed(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """What ``preflight.json`` holds."""
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "facts": self.facts,
            "findings": [asdict(f) for f in self.findings],
        }

    def require(self) -> None:
        """Let a run go on, or not.

        Raises:
            UserError: there are errors.
        """
        if self.passed:
            return
        first = self.errors[0]
        more = f" (and {len(self.errors) - 1} more, see the table)" if len(self.errors) > 1 else ""
        raise UserError(
            f"the pre-flight refuses this run: {first.code}: {first.message}{more}",
            where=", ".join(first.rows) or None,
            remedy=first.remedy or None,
        )
