"""The kind that all groups of recipe fields are of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of recipe fields; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


def as_list(value: Any) -> Any:
    """One value as the list of itself, for a field that takes several."""
    return value if value is None or isinstance(value, list) else [value]
