"""What the pre-flight reports: findings, each with a code, the rows concerned and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from luthier.data.examples import Source
from luthier.errors import UserError

Severity = Literal["error", "warning", "info"]
_PLACES = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, doubtful or worth knowing."""

    code: str
    """Short name, stable across versions, for example ``answer_cut``."""
    severity: Severity
    message: str
    remedy: str = ""
    count: int = 0
    """Rows concerned; 0 where it concerns the run as a whole."""
    rows: tuple[str, ...] = ()
    """The first of their places, ``file:line``."""


def places(sources: Iterable[Source | None]) -> tuple[str, ...]:
    """The first few places of rows, for a finding."""
    named = []
    for source in sources:
        if source is not None:
            named.append(str(source))
        if len(named) == _PLACES:
            break
    return tuple(named)


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
