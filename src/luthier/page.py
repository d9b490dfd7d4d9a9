"""An HTML page of our own: one file with no script and nothing from elsewhere, light and dark."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --dim: #667; --line: #d8dce2; --bar: #3b78c4;
  --error: #b3261e; --warning: #8a5a00; --info: #00696f; --good: #0a6b34; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #15181c; --dim: #9aa3ae; --line: #353b43;
  --bar: #6fa8ee; --error: #ff8a80; --warning: #f2b84b; --info: #5fd0d6; --good: #6fd796; } }
body { font: 15px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; margin: .5rem 0; } th, td { padding: .2rem .8rem .2rem 0; text-align: right; }
th { color: var(--dim); font-weight: 500; border-bottom: 1px solid var(--line); } .left { text-align: left; }
.dim { color: var(--dim); } svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .bar { fill: var(--bar); } svg .axis { stroke: var(--line); }
svg .curve { stroke: var(--bar); fill: none; stroke-width: 2; } svg .dim { fill: var(--dim); }
article { border-left: 4px solid var(--line); padding: .1rem 1rem; margin: 1.2rem 0; }
article.error { border-color: var(--error); } article.warning { border-color: var(--warning); }
article.info { border-color: var(--info); } .error b { color: var(--error); } .warning b { color: var(--warning); }
.info b { color: var(--info); } code { overflow-wrap: anywhere; white-space: pre-wrap; } ul { padding-left: 1.2rem; }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: a text.
        body: HTML, in which every text has gone through :func:`text`.
        style: rules beside :data:`STYLE`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing in here could run or load anything, whatever the texts hold.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def harmless(value: object) -> str:
    """A text with its half characters and controls, which no page may hold, written out."""
    shown = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c >= " " or c in "\n\t" else f"\\x{ord(c):02x}" for c in shown)


def text(value: object) -> str:
    """A text as HTML."""
    return escape(harmless(value))
