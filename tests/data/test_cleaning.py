"""Text cleaners: real cases in Chinese and English, and what must hold for any text."""

from __future__ import annotations

import csv
import json
import re
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.data.cleaning.characters import normalize_fullwidth, normalize_unicode, remove_special_chars
from luthier.data.cleaning.markup import strip_html
from luthier.data.cleaning.mojibake import fix_mojibake
from luthier.data.cleaning.spacing import normalize_cjk_spacing, normalize_whitespace, remove_empty_lines

CODE = "Use this:\n\n```python\ndef f(x):\n\treturn  x  # two  blanks\n\n\n```\nIt works."


@pytest.mark.parametrize(
    ("clean", "text", "wanted"),
    [
        # Encodings mixed up.
        (fix_mojibake, "ä½ å¥½", "你好"),
        (fix_mojibake, "ä½\xa0å¥½ä¸–ç•Œ", "你好世界"),
        (fix_mojibake, "浣犲ソ", "你好"),
        (fix_mojibake, "说：浣犲ソ, 对", "说：浣犲ソ, 对"),  # a run that is not wholly broken can't be told
        (fix_mojibake, "ÄãºÃ£¬ÊÀ½ç", "你好，世界"),
        (fix_mojibake, "cafÃ© â€œoldâ€\x9d", "café “old”"),
        (fix_mojibake, "“naïve” l’été Ångström ﬁne 中国联通 ＡＢＣ", None),
        (fix_mojibake, "&lt;b&gt; Â£5 锟斤拷", "&lt;b&gt; £5 锟斤拷"),
        (fix_mojibake, "目录····3 °°°° ½½½½ ±±±± «très élevé» éèêë №№№ ¿¡¿¡", None),
        (fix_mojibake, "Ð¿Ð¸Ð²Ð¾, Î±Î²Î³Î´", "пиво, αβγδ"),
        # Full-width forms.
        (normalize_fullwidth, "１２３ＡＢＣａｂｃ", "123ABCabc"),
        (normalize_fullwidth, "价格是１２．５％，对吗？", "价格是12.5%，对吗？"),
        (normalize_fullwidth, "你好，世界！（真的：是）；？“”。、《》～", None),
        (normalize_fullwidth, "Ｈｅｌｌｏ，ｗｏｒｌｄ！（ｏｋ）", "Hello,world!(ok)"),
        (normalize_fullwidth, "会议１２：３０开始，比分3：2", "会议12:30开始，比分3：2"),
        (normalize_fullwidth, "姓名　电话", "姓名 电话"),
        (normalize_fullwidth, "！！！", None),
        # Invisible characters.
        (remove_special_chars, "\ufeff你\u200b好\u2060\xad世界\x00\x07", "你好世界"),
        (remove_special_chars, "tab\tline\r\nend", None),
        (remove_special_chars, "👩‍👩‍👧 🏳️‍🌈 👁️‍🗨️ 👨🏽‍💻 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥", None),
        (remove_special_chars, "می‌خواهم क्‍ष", None),
        (remove_special_chars, "a\u200db 中\u200c文 👩\u200d", "ab 中文 👩"),
        (remove_special_chars, "page one\fpage two", "page one\npage two"),
        (remove_special_chars, "x\ue000\ufffd\U0010ffff\ufdd0y", "xy"),
        # Composed letters.
        (normalize_unicode, "cafe\u0301", "café"),
        (normalize_unicode, "①ﬁ，ＡＢ", None),
        # White space.
        (normalize_whitespace, "  a  b \t c\r\nd\u3000e  \n\n f \xa0g ", "a b c\nd e\n\n f g"),
        (normalize_whitespace, "def f(x):\n    if x:\n        return  1", "def f(x):\n    if x:\n        return 1"),
        (normalize_whitespace, "\n    def f():\n        pass\n", "def f():\n    pass"),
        (normalize_whitespace, "  hello\nworld", "hello\nworld"),
        (normalize_whitespace, "\xa0\xa0x\n\xa0\xa0  y\n\u3000\u3000第二段", "x\n    y\n第二段"),
        (normalize_whitespace, CODE, None),
        (normalize_whitespace, "a\u2028b\u2029c\x0bd\x85e", "a\nb\nc\nd\ne"),
        (remove_empty_lines, "a\n\n \nb\n", "a\nb"),
        # Spaces in Chinese.
        (normalize_cjk_spacing, "我 们 去 北 京 ， 明 天 见 。", "我们去北京，明天见。"),
        (normalize_cjk_spacing, "苹果 香蕉 橘子 A B C", None),
        (normalize_cjk_spacing, "你好 ，世界。 再见", "你好，世界。再见"),
        (normalize_cjk_spacing, "用 Python 写 3 行", None),
        (normalize_cjk_spacing, "한국어 는 띄어 쓰 기 를", None),
        (normalize_cjk_spacing, "代码 `我 们 去 吧`", None),
        # HTML.
        (strip_html, "<p>Hello <b>world</b> &amp; co</p><p>two<br/>three</p>", "Hello world & co\ntwo\nthree"),
        (strip_html, "<div class='x'>你好&nbsp;世界</div><script>var a='<b>';</script><!-- c -->好", "你好 世界\n好"),
        (strip_html, "<table><tr><th>a</th>\n <th>b</th></tr>\n<tr><td>c<td>d</table>", "a\tb\nc\td"),
        (strip_html, "<b>use `<i>y</i>` now</b>", "use `<i>y</i>` now"),
        (strip_html, "<pre><code>if a &lt; b:\n    x()</code></pre> ok", "```\nif a < b:\n    x()\n```\n ok"),
        (strip_html, "write <code>&lt;br&gt;</code>", "write `<br>`"),
        (strip_html, "Use the &lt;br&gt; tag", None),
        (strip_html, "5 &lt; 6 &amp;&amp; 7 &amp;gt; 2", "5 < 6 && 7 > 2"),
        (strip_html, "a < b and c > d; a <b and c> d; x<y>z; if (a<b && c>d)", None),
        (strip_html, "List<int> x; Map<String, List<Object>> m; vector<input> v; Set<Label>", None),
        (strip_html, "<think>Is 2<3?</think><answer>yes</answer><|im_end|></s><s>", None),
        (strip_html, "<p> = 0 and E = <x|H|y>, AT&T, ?a=1&copy=2, R&D; x &unknown; y", None),
        (strip_html, "```html\n<p>stay</p>\n```", None),
    ],
)
def test_real_cases(clean, text, wanted):
    wanted = text if wanted is None else wanted
    assert clean(text) == wanted
    assert clean(wanted) == wanted


def test_options():
    assert fix_mojibake("浣犲ソ cafÃ©", chinese=False) == "浣犲ソ café"
    assert normalize_fullwidth("Ａ１＠　，", letters=False, spaces=False, punctuation="keep") == "Ａ1@　，"
    assert normalize_fullwidth("你好，Ａ", punctuation="all") == "你好,A"
    assert normalize_unicode("①", form="NFKC") == "1"
    assert normalize_whitespace("a:\n    b", keep_indentation=False) == "a:\nb"
    assert normalize_whitespace("```\nx  y\n```", keep_code=False) == "```\nx y\n```"
    assert remove_empty_lines("a\n\n\n\nb", keep=1) == "a\n\nb"
    assert normalize_cjk_spacing("苹果 香蕉", between="all") == "苹果香蕉"
    spaced = normalize_cjk_spacing("用Python写3行，见https://x.cn/中文a/和`中a`", latin="space")
    assert spaced == "用 Python 写 3 行，见 https://x.cn/中文a/和`中a`"
    assert normalize_cjk_spacing("用 Python 写 3 行", latin="none") == "用Python写3行"
    assert strip_html("x<sub>1</sub> <b>b</b>", keep=["sub"]) == "x<sub>1</sub> b"
    assert strip_html("`<b>x</b>`", keep_code=False) == "`x`"


# Letters and signs that each cleaner stumbles over, and any others.
_TRICKY = {
    fix_mojibake: "ä½ å¥\xa0½浣犲ソÄãºÃ£¬你好aé€™â",
    normalize_fullwidth: "１Ａ，：。　a1中！",
    normalize_unicode: "e\u0301\u0327é가①ﬁ",
    remove_special_chars: "a中\u200d\u200c\u200b\ufeff👩🏴\U000e0067\U000e007f\x00\f\n",
    normalize_whitespace: "a中 \t\n\r\xa0\u3000`~\x1c\u2028",
    remove_empty_lines: "a \n\t",
    normalize_cjk_spacing: "我们，。a1 \t\u3000`\n（）",
}
_PIECES = [
    "<p>",
    "</p>",
    "<b>",
    "</b>",
    "<br>",
    "<td>",
    "<tr>",
    "&lt;",
    "&amp;",
    "gt;",
    "#60;",
    "<",
    ">",
    "/",
    "`",
    "```",
]
_PIECES += ["<pre>", "</pre>", "<code>", "</code>", "<!--", "-->", "<script>", "</script>", " ", "\n", "a", "中", "&"]
_OPTIONS = {
    fix_mojibake: [{"chinese": False}],
    normalize_fullwidth: [{"punctuation": "all"}, {"punctuation": "keep"}, {"letters": False, "spaces": False}],
    normalize_unicode: [{"form": "NFKC"}],
    remove_special_chars: [],
    normalize_whitespace: [{"keep_indentation": False}, {"keep_code": False}],
    remove_empty_lines: [{"keep": 1}],
    normalize_cjk_spacing: [{"between": "all"}, {"latin": "space"}, {"latin": "none", "between": "all"}],
    strip_html: [{"keep": ("b",)}],
}


def _texts_for(clean):
    if clean is strip_html:
        return st.lists(st.sampled_from(_PIECES), max_size=12).map("".join) | st.text(max_size=30)
    return st.text(alphabet=_TRICKY[clean], max_size=30) | st.text(max_size=30)


@pytest.mark.parametrize("clean", list(_OPTIONS), ids=lambda f: f.__name__)
@settings(max_examples=200)
@given(data=st.data())
def test_cleaning_twice_is_cleaning_once(clean, data):
    text = data.draw(_texts_for(clean))
    for options in ({}, *_OPTIONS[clean]):
        once = clean(text, **options)
        assert clean(once, **options) == once, options


@given(st.text(alphabet=st.characters(categories=("L", "N", "P"), max_codepoint=0x7F), max_size=40))
def test_plain_ascii_words_are_untouched(text):
    text = text.replace("&", "").replace("<", "")
    for clean in _OPTIONS:
        assert clean(text) == text


@given(
    st.text(
        alphabet="的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年，。！？：；（）《》",
        max_size=60,
    )
)
@example("是，是，")
def test_plain_chinese_is_untouched(text):
    for clean in _OPTIONS:
        assert clean(text) == text


@given(st.text(alphabet="的一是在不了有和人这中大为上个国我以要他时来用们生到作地于", min_size=2, max_size=12))
def test_chinese_read_by_the_wrong_encoding_comes_back(text):
    """Wherever no byte was lost."""
    assert fix_mojibake(text.encode("utf-8").decode("latin-1")) == text
    read = text.encode("gb2312").decode("latin-1")
    if len(set(read)) >= 3 and max(read) >= "À":  # else it may be a row of signs
        assert fix_mojibake(read) == text
    try:
        broken = text.encode("utf-8").decode("gbk")
    except UnicodeDecodeError:
        return
    assert fix_mojibake(broken) == text


def test_what_stays_and_what_goes_by_category():
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF and unicodedata.category(chr(code))[0] in "LNPSMZ" and chr(code) != "\ufffd":
            assert remove_special_chars(chr(code)) == chr(code), hex(code)


@pytest.mark.parametrize(
    "unit", ["<p>", "<b", "<a x=", "&amp;", "`", "<!--", "ä½", "中 ", " \n", "\u200d", "<pre>", "~~~\n"]
)
def test_no_text_takes_long(unit):
    text = unit * (60_000 // len(unit))
    for clean in _OPTIONS:
        clean(text)


def test_real_rows(shared_data):
    def texts(name):
        rows = json.loads((shared_data / name).read_text("utf-8"))
        return [row[key] for row in rows for key in ("instruction", "input", "output")]

    chinese, english = texts("alpaca_zh_demo.json"), texts("alpaca_en_demo.json")
    with (shared_data / "waimai_10k.csv").open(encoding="utf-8") as file:
        reviews = [row["review"] for row in csv.DictReader(file)]
    for clean in _OPTIONS:
        for text in (*chinese, *english, *reviews):
            once = clean(text)
            assert clean(once) == once
    # None of these files was decoded wrongly, and only rows that are about HTML hold any.
    assert [t for t in (*chinese, *english, *reviews) if fix_mojibake(t) != t] == []
    assert all("<html>" in t or "<table>" in t for t in (*chinese, *english, *reviews) if strip_html(t) != t)
    # Indented code keeps its shape.
    indented = [t for t in english if re.search(r"\S\n    \S", t)]
    assert indented and all("\n    " in normalize_whitespace(t) for t in indented)
