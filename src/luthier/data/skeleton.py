"""What a chat template writes around contents that it does not look into.

Most templates only put a turn's content somewhere, perhaps trimmed, perhaps after asking whether ``</think>`` is in
it. For conversations of given roles such a template is a fixed text with gaps, found once by rendering contents that
note what is asked of them; filling the gaps is then twenty times as fast as rendering.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# Code in which a content stays what :class:`_Content` knows of. Anything else (``~``, macros, other filters, a call
# that reads the clock) could copy it into an ordinary text and look into that.
_CODE = (
    "Template Output TemplateData For If Assign Const Name NSRef Getitem Getattr Slice Add Sub Mod Neg Compare Operand "
    "Test Keyword Not And Or CondExpr List Tuple"
)
_NODES = frozenset(_CODE.split())
_FILTERS = frozenset({"trim", "length", "tojson"})
_CALLS = frozenset({"raise_exception", "namespace"})
_TRIMS = frozenset({"strip", "lstrip", "rstrip"})
_QUESTIONS = frozenset({"startswith", "endswith"})
_METHODS = _TRIMS | _QUESTIONS | {"split", "items"}
# The quotation mark is for tojson, which would write it otherwise, so that the gap is no longer one.
_GAP = re.compile('\ue000(\\d+),(\\d*)"\ue001')


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The text that a template writes for turns of given roles."""

    parts: tuple[str | tuple[int, str, tuple[Any, ...]], ...]
    """Texts as they stand, and gaps: which turn's content, and how it is trimmed."""
    denied: tuple[tuple[int, str, Any], ...]
    """What must not be true of a content for this to be the text: which one, the method and its argument."""

    def filled(self, contents: Sequence[str]) -> str | None:
        """The text with these contents; None where the template would write another."""
        for n, method, argument in self.denied:
            if getattr(contents[n], method)(argument):
                return None
        return "".join([part if type(part) is str else _trimmed(contents, *part) for part in self.parts])


def _trimmed(contents: Sequence[str], n: int, method: str, arguments: tuple[Any, ...]) -> str:
    return str(getattr(contents[n], method)(*arguments)) if method else contents[n]


class _Looked(Exception):
    """The template looked into a content."""


def _refuse(*_: Any) -> NoReturn:
    raise _Looked


class _Content(str):
    """A content that can be joined, trimmed once and written; what is asked of it is noted and denied."""

    notes: _Notes

    @classmethod
    def of(cls, notes: _Notes, text: str) -> _Content:
        made = cls(text)
        made.notes = notes
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in _TRIMS:
            return lambda *arguments: self._trim(name, arguments)
        if name in _QUESTIONS:
            return lambda argument: self._deny(name, argument)
        return super().__getattribute__(name) if name in ("notes", "_trim", "_deny", "__class__") else _refuse()

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> _Content:
        return _Content.of(self.notes, str.__add__(self, other))

    def __radd__(self, other: str) -> _Content:
        return _Content.of(self.notes, str.__add__(other, self))

    def __contains__(self, argument: object) -> bool:
        return self._deny("__contains__", argument)

    def _trim(self, method: str, arguments: tuple[Any, ...]) -> _Content:
        gap = _GAP.fullmatch(self) or _refuse()
        if gap[2]:
            return self if self.notes.trims[int(gap[2])] == (method, arguments) else _refuse()
        self.notes.trims.append((method, arguments))
        return _Content.of(self.notes, f'\ue000{gap[1]},{len(self.notes.trims) - 1}"\ue001')

    def _deny(self, method: str, argument: Any) -> bool:
        gap = _GAP.fullmatch(self) or _refuse()
        if gap[2] or not argument or type(argument) is not str:
            _refuse()
        self.notes.denied.append((int(gap[1]), method, argument))
        return False

    __bool__ = __len__ = __iter__ = __getitem__ = __eq__ = __ne__ = __hash__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __rmod__ = __mul__ = __rmul__ = __format__ = _refuse


class _Notes:
    def __init__(self) -> None:
        self.trims: list[tuple[str, tuple[Any, ...]]] = []
        self.denied: list[tuple[int, str, Any]] = []


def keeps_contents(source: str, environment: Environment) -> bool:
    """Whether a template's code has nothing in it that could hide a content from :class:`_Content`."""
    from jinja2 import nodes

    def fine(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter):
            return node.name in _FILTERS
        if isinstance(node, nodes.Call):
            called, constant = node.node, all(isinstance(a, nodes.Const) for a in node.args)
            if isinstance(called, nodes.Getattr):
                return called.attr in _METHODS and constant and not node.kwargs
            return isinstance(called, nodes.Name) and called.name in _CALLS
        return type(node).__name__ in _NODES

    return "\ue000" not in source and all(fine(node) for node in environment.parse(source).find_all(nodes.Node))


def skeleton(template: Template, values: dict[str, Any], roles: Sequence[str]) -> Skeleton | None:
    """What a template writes around the contents of turns of these roles; None where it looks into one of them.

    Args:
        template: one that :func:`keeps_contents`.
        values: its variables, but for the turns.
        roles: of the turns, which have a content and nothing else.
    """
    notes = _Notes()
    turns = [{"role": r, "content": _Content.of(notes, f'\ue000{n},"\ue001')} for n, r in enumerate(roles)]
    try:
        context = template.new_context({**values, "messages": turns, "tools": None}, shared=True)
        text = "".join(["", *template.root_render_func(context)])
    except Exception:
        # The template refuses these roles, or a content refused: either way it is to be rendered as it is.
        return None
    parts: list[str | tuple[int, str, tuple[Any, ...]]] = []
    end = 0
    for gap in _GAP.finditer(text):
        method, arguments = notes.trims[int(gap[2])] if gap[2] else ("", ())
        parts += [text[end : gap.start()], (int(gap[1]), method, arguments)]
        end = gap.end()
    parts.append(text[end:])
    if any("\ue000" in part for part in parts if isinstance(part, str)):
        return None
    return Skeleton(tuple(parts), tuple(dict.fromkeys(notes.denied)))
