"""The pre-flight gate: what could make a run finish green with the wrong model, found before step one."""

from luthier.data.findings import Finding
from luthier.training.preflight.findings import Preflight
from luthier.training.preflight.gate import preflight
from luthier.training.preflight.view import render_preflight

__all__ = ["Finding", "Preflight", "preflight", "render_preflight"]
