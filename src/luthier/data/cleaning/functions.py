"""A user's own function, named in a recipe as MODULE:FUNCTION or FILE.py:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rapidfuzz import process

from luthier.errors import UserError


def load_function(name: str, where: str | None = None) -> Callable[..., Any]:
    """The function that ``module:function`` or ``path/to/file.py:function`` names.

    A module is looked for on Python's path and in the working folder.

    Raises:
        UserError: there is no such module or function, or the module fails on import.
    """
    module_name, _, function_name = name.rpartition(":")
    is_file = module_name.endswith(".py")
    try:
        module = _from_file(Path(module_name).expanduser()) if is_file else _from_path(module_name)
    except FileNotFoundError:
        raise UserError(f"{module_name!r} does not exist", where=where, remedy="mend the path") from None
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.split(".")[0] == error.name:
            remedy = f"run where {module_name}.py lies, or name the file: path/to/{module_name}.py:{function_name}"
            raise UserError(f"no module is called {module_name!r}", where=where, remedy=remedy) from None
        what = f"{module_name!r} failed on import: {type(error).__name__}: {error}"
        raise UserError(what, where=where, remedy="mend it; `python -c 'import …'` shows the whole error") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        near = process.extractOne(function_name, known, score_cutoff=60)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known[:10]) or 'no function'}"
        raise UserError(f"{module_name!r} has no function {function_name!r}", where=where, remedy=hint)
    return function


def _from_path(name: str) -> ModuleType:
    # The command line's own path begins at its script, not at the working folder.
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and pickle look a module up; a name that is taken stays so.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
