"""The one error that a user sees, and the quiet one of a process that stops because another did.

Everything a user can get wrong raises :class:`UserError`. The command line prints it without a traceback and
exits with code 2; in Python it is an ordinary exception.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: says what is wrong, where, and what to do.

    Args:
        what: what was wrong, in one sentence, naming the offending value.
        where: the place: a file, ``file:line``, a recipe field.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if remedy:
            lines.append(f"  to do: {remedy}")
        super().__init__("\n".join(lines))


class FailedElsewhere(Exception):
    """This process ends because another one of the same run has failed.

    Args:
        what: what is known of it.
        told: whether the other process says itself what went wrong, so that this one need not.
    """

    def __init__(self, what: str, *, told: bool = False) -> None:
        super().__init__(what)
        self.told = told


def shorten(value: object, limit: int = 80) -> str:
    """``repr`` of a value, cut to ``limit`` characters, so that a 2 MB row does not flood an error message."""
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit - 1]!r}… ({len(value):,} characters)"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def counted(count: int, noun: str) -> str:
    """A number with its noun: ``1 row``, ``1,200 rows``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
