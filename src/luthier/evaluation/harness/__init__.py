"""Tasks of lm-evaluation-harness, asked of a model that Luthier has loaded (the extra ``luthier[harness]``)."""

from __future__ import annotations

from importlib.util import find_spec

from luthier.errors import UserError


def require_harness() -> None:
    """Whether the package is there.

    Raises:
        UserError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "benchmarks are asked through the package lm_eval, which isn't installed",
            remedy="pip install 'luthier[harness]'",
        )
