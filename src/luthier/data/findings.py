"""What checks report: findings, each with a code, the rows concerned and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from luthier.data.examples import Source

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
PLACES = 5


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
    share: float | None = None
    """The rows concerned, as a share of those looked at."""
    samples: tuple[str, ...] = ()
    """What was found there, one for each of the first places."""


def places(sources: Iterable[Source | None]) -> tuple[str, ...]:
    """The first few places of rows, for a finding."""
    named = []
    for source in sources:
        if source is not None:
            named.append(str(source))
        if len(named) == PLACES:
            break
    return tuple(named)


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then by how many rows are concerned."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), -f.count))
