"""HTML to text, where a text holds HTML; comparisons, generics, maths and a model's own tags stay.

A parser that builds a tree (html5lib's, lxml's) takes every ``<`` for a tag and loses what it can't place. This one
reads tags by the standard's grammar and decides for each whether it is one.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from luthier.data.cleaning.code import blank_code, outside_code

# A tag as the HTML standard writes it (13.1.2): a name, then attributes with or without values in quotes.
_ATTRIBUTE = r"""\s+[A-Za-z_:@][\w:.-]{0,80}(?:\s*=\s*(?:"[^"<]*"|'[^'<]*'|[^\s"'=<>`]+))?"""
_TAG = re.compile(rf"<(?P<close>/?)(?P<name>[A-Za-z][A-Za-z0-9]{{0,15}})(?P<rest>(?:{_ATTRIBUTE}){{0,40}})\s*/?>")
_VALUED = re.compile(r"""[\w:@.-]+\s*=\s*(?:"[^"<]*"|'[^'<]*'|[^\s"'=<>`]+)""")
_BARE = re.compile(r"[\w:@.-]+")
# What runs from its beginning to its end, whatever stands between.
_WHOLE = re.compile(r"<!--|<!(?=doctype\s)|<(script|style|noscript|template|pre)(?:\s[^<>]*)?>", re.IGNORECASE)
_ENDS = {
    name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in ("script", "style", "noscript", "template", "pre")
}
_ENDS |= {"<!--": re.compile("-->"), "<!": re.compile(">")}
_CODE_IN_PRE = re.compile(r"\s*?<code(?:\s[^<>]*)?>(.*)</code\s*>\s*", re.DOTALL | re.IGNORECASE)
_CODE = re.compile(r"<code(?:\s[^<>]*)?>([^`\n]{0,2000}?)</code\s*>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

_VOID = frozenset(("br", "hr", "img", "input", "meta", "link", "wbr", "area", "base", "col", "source", "track"))
# Elements whose end may be left out (13.1.2.4). Not p: alone, <p> may be the mean of p.
_OPEN_ENDED = frozenset(("li", "dt", "dd", "tr", "td", "th", "thead", "tbody", "tfoot"))
# Elements that begin a line of their own.
_BLOCKS = frozenset(
    (
        *("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "thead"),
        *("tbody", "tfoot", "caption", "blockquote", "pre", "hr", "header", "footer", "main", "section", "article"),
        *("aside", "nav", "figure", "figcaption", "form", "fieldset", "address", "html", "body", "head", "title"),
        *("center", "details"),
    )
)
_INLINE = frozenset(
    (
        *("a", "abbr", "b", "big", "bdi", "bdo", "br", "cite", "code", "del", "dfn", "em", "font", "i", "img", "input"),
        *("ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "samp", "small", "span", "strike", "strong", "sub"),
        *("sup", "tt", "u", "var", "wbr", "td", "th", "colgroup", "col", "meta", "link", "base", "button", "select"),
        *("option", "textarea", "iframe", "object", "embed", "video", "audio", "source", "track", "canvas", "svg"),
        *("path", "picture", "map", "area", "script", "style"),
    )
)
# Not among them, for models and prompts use these as tags of their own: s (a control token), summary, output, data.
_ELEMENTS = _BLOCKS | _INLINE
_BOOLEAN = frozenset(
    (
        *("allowfullscreen", "async", "autofocus", "autoplay", "checked", "controls", "default", "defer", "disabled"),
        *("hidden", "ismap", "loop", "multiple", "muted", "novalidate", "nowrap", "noshade", "open", "readonly"),
        *("required", "reversed", "selected"),
    )
)
# A text made to hold tags within tags is not unwrapped for ever.
_PASSES = 20


@dataclass(frozen=True, slots=True)
class _Tag:
    start: int
    end: int
    name: str
    closes: bool
    glued: bool
    """To a word before it, as in Vector<input>."""


@dataclass(frozen=True, slots=True)
class _Whole:
    start: int
    end: int
    name: str
    inner_start: int
    inner_end: int


def strip_html(text: str, *, keep: Sequence[str] = (), keep_code: bool = True) -> str:
    """HTML to plain text: tags go, entities become characters, comments, scripts and styles are dropped.

    Paragraphs, list items, rows and <br> begin a line; <pre> becomes fenced code and <code> `code`. A text without HTML
    is not touched, and what only looks like it stays: ``a < b and c > d``, ``List<int>``, ``<think>``. A tag counts
    where its name and attributes are HTML's, and its end is there too or may be missing. An escaped tag
    (``&lt;br&gt;``) that would read as markup once unescaped stays escaped.

    Args:
        text: any text.
        keep: names of elements whose tags stay, for example sub and sup.
        keep_code: code in backticks or fences stays as it is.
    """
    if "<" not in text and "&" not in text:
        return text
    kept = frozenset(name.lower() for name in keep)
    given = text
    for _ in range(_PASSES):
        before = text
        if "<pre" in text.lower() or "<code" in text.lower():
            text = outside_code(text, lambda prose: _code_to_markdown(prose, kept))
        text = _without_unseen(text, kept, keep_code)
        if tags := _tags(blank_code(text) if keep_code else text, kept):
            text = _without(text, tags)
        if "&" in text:
            text = _unescape(text, kept, keep_code)
        if text == before:
            break
    return text if text == given else text.strip()


def _code_to_markdown(text: str, keep: frozenset[str]) -> str:
    """<pre> as a fence and <code> in backticks, so that their content is code from here on."""

    def fence(content: str) -> str:
        code = _CODE_IN_PRE.fullmatch(content)
        content = html.unescape(_TAG.sub("", code[1] if code else content)).strip("\n")
        ticks = "`" * max((3, *(len(run) + 1 for run in re.findall("`+", content))))
        return f"\n{ticks}\n{content}\n{ticks}\n"

    def span(match: re.Match[str]) -> str:
        content = html.unescape(_TAG.sub("", match[1]))
        return f"`{content}`" if content.strip() and "`" not in content and "\n" not in content else match[1]

    if "pre" not in keep:
        parts: list[str] = []
        at = 0
        for whole in _wholes(text):
            if whole.name == "pre":
                parts += (text[at : whole.start], fence(text[whole.inner_start : whole.inner_end]))
                at = whole.end
        text = "".join((*parts, text[at:]))
    return text if "code" in keep else _CODE.sub(span, text)


def _wholes(text: str) -> Iterator[_Whole]:
    """Comments, document types, scripts, styles and <pre>, each with its end; one without an end is none."""
    endless: set[str] = set()
    at = 0
    while match := _WHOLE.search(text, at):
        at = match.end()
        name = (match[1] or match[0]).lower()
        if name in endless:
            continue
        end = _ENDS[name].search(text, at)
        if end is None:
            endless.add(name)
            continue
        yield _Whole(match.start(), end.end(), name, at, end.start())
        at = end.end()


def _without_unseen(text: str, keep: frozenset[str], keep_code: bool) -> str:
    """The text without what a browser doesn't show: comments, scripts, styles."""
    if "<" not in text:
        return text
    parts: list[str] = []
    at = 0
    for whole in _wholes(blank_code(text) if keep_code else text):
        if whole.name != "pre" and whole.name not in keep:
            parts.append(text[at : whole.start])
            at = whole.end
    return "".join((*parts, text[at:]))


def _tags(text: str, keep: frozenset[str]) -> list[_Tag]:
    """The tags of a text that are HTML."""
    seen: list[_Tag] = []
    for match in _TAG.finditer(text):
        written, rest = match["name"], match["rest"]
        name = written.lower()
        # HTML is written <br> or <BR>; <Object> and <Label> are types.
        if name not in _ELEMENTS or name in keep or not (written == name or written.isupper()):
            continue
        # ``a <b and c> d``: words that are no attributes.
        if rest and not all(bare.lower() in _BOOLEAN for bare in _BARE.findall(_VALUED.sub(" ", rest))):
            continue
        before = text[max(0, match.start() - 1) : match.start()]
        glued = not rest and before.isascii() and (before.isalnum() or before in ("_", ")", "]"))
        seen.append(_Tag(match.start(), match.end(), name, bool(match["close"]), glued))
    starts = {tag.name for tag in seen if not tag.closes}
    ends = {tag.name for tag in seen if tag.closes}

    def counts(tag: _Tag) -> bool:
        if tag.closes:
            return tag.name in starts or len(tag.name) > 1
        if tag.name in ends or tag.name == "br":
            return True
        return tag.name in _OPEN_ENDED or (tag.name in _VOID and not tag.glued)

    if not any(map(counts, seen)):
        return []
    return [tag for tag in seen if counts(tag) or tag.name == "p"]


def _without(text: str, tags: list[_Tag]) -> str:
    """The text with tags taken out: a line's end for a block's, a tab between a table's cells, nothing for others."""
    parts: list[str] = []
    at = 0
    fresh = False  # a block or cell has just begun or ended: white space that follows is layout
    cells = False  # this row of a table has a cell already
    for tag in tags:
        piece = text[at : tag.start].lstrip() if fresh else text[at : tag.start]
        at = tag.end
        if piece:
            parts.append(piece)
            fresh = False
        if tag.name == "br":
            parts.append("\n")
        elif tag.name in _BLOCKS:
            _end_line(parts)
            fresh, cells = True, False
        elif tag.name in ("td", "th") and not tag.closes:
            if cells:
                _trim(parts, None)
                parts.append("\t")
            fresh = cells = True
    return "".join((*parts, text[at:].lstrip() if fresh else text[at:]))


def _end_line(parts: list[str]) -> None:
    _trim(parts, " \t")
    if parts and not parts[-1].endswith("\n"):
        parts.append("\n")


def _trim(parts: list[str], blanks: str | None) -> None:
    """Take blanks (None: white space) off the end of what has been put together."""
    while parts:
        last = parts.pop().rstrip(blanks)
        if last:
            parts.append(last)
            return


def _unescape(text: str, keep: frozenset[str], keep_code: bool) -> str:
    def decoded(character: Callable[[re.Match[str]], str]) -> str:
        if keep_code:
            return outside_code(text, lambda prose: _ENTITY.sub(character, prose))
        return _ENTITY.sub(character, text)

    plain = decoded(_character)
    if plain != text:
        prose = blank_code(plain) if keep_code else plain
        if _tags(prose, keep) or any(True for _ in _wholes(prose)) or "<code" in prose.lower():
            return decoded(lambda match: f"&{match[1]};" if _character(match) in "<>`" else _character(match))
    return plain


def _character(match: re.Match[str]) -> str:
    """The character of an entity, escaped once or more often; the entity itself where there's none of that name."""
    entity = f"&{match[1]};"
    character = html.unescape(entity)
    if character == "\xa0":
        return " "
    return match[0] if character == entity else character
