"""The readers: whatever standard writers wrote comes back, and every file reads as it does when held whole."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import math
import random
import re
import string
import tracemalloc
import zipfile

import openpyxl
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import reference_reader
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.examples import Reject
from luthier.data.readers import Row, encoding_of, open_reader, read_rows
from luthier.data.readers.document import Document
from luthier.data.readers.text import find_encoding
from luthier.errors import UserError

MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Anything that a file of UTF-8 can hold: every character but half surrogates.
TEXT = st.one_of(
    st.text(),
    st.text("a\"',;\t\n\r\\|{}[]: \u2028\ufeff茶🙂\u0000\u007f\u0085"),
    st.sampled_from(["", " ", "1", "null", "NaN", "=1+1", "_x000D_", "#N/A", "'quoted", "\ufeffmarked", "a\r\nb"]),
)
NUMBER = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=4), min_size=1, max_size=6)


def values(path, **options):
    rows = list(open_reader(path, **options).rows())
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows]


def packed(path, content):
    """The content in a file, as it is or in an archive, by the file's name."""
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


# --- what standard writers wrote ---


@MANY
@given(
    rows=ROWS,
    ascii_only=st.booleans(),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    packing=st.sampled_from(["", ".gz", ".zst"]),
)
def test_jsonl(tmp_path, rows, ascii_only, ending, packing):
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + ending for row in rows)
    assert values(packed(tmp_path / f"rows.jsonl{packing}", text.encode())) == rows


@MANY
@given(
    rows=ROWS,
    indent=st.sampled_from([None, 0, 2]),
    under=st.sampled_from([None, "data"]),
    packing=st.sampled_from(["", ".gz", ".zst"]),
)
def test_json(tmp_path, rows, indent, under, packing):
    content = {"version": 1, under: rows, "more": [1]} if under else rows
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    assert values(packed(tmp_path / f"rows.json{packing}", text.encode())) == rows


@MANY
@given(
    header=st.lists(
        st.text(string.ascii_letters + "问答 _", min_size=1).map(str.strip).filter(bool),
        min_size=2,
        max_size=4,
        unique=True,
    ),
    data=st.data(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    kind=st.sampled_from(["csv", "tsv", "csv.gz", "tsv.zst"]),
)
def test_csv(tmp_path, header, data, quoting, kind):
    cell = TEXT.filter(lambda t: "\0" not in t)  # A zero byte marks a file as UTF-16.
    rows = data.draw(st.lists(st.lists(cell, min_size=len(header), max_size=len(header)), min_size=1, max_size=5))
    plain = tmp_path / "plain"
    with plain.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if "tsv" in kind else ",", quoting=quoting)
        writer.writerows([header, *rows])
    path = packed(tmp_path / f"rows.{kind}", plain.read_bytes())
    assert values(path) == [dict(zip(header, row, strict=True)) for row in rows]


@MANY
@given(
    columns=st.dictionaries(
        TEXT.filter(bool),
        st.sampled_from(
            [TEXT, st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(allow_nan=False), st.lists(TEXT)]
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
    kind=st.sampled_from(["parquet", "arrow-stream", "arrow-file"]),
)
def test_parquet_and_arrow(tmp_path, columns, data, kind):
    row = st.fixed_dictionaries({name: st.one_of(st.none(), kind) for name, kind in columns.items()})
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    table = pyarrow.Table.from_pylist(rows)
    path = tmp_path / f"rows.{kind.partition('-')[0]}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        make = pyarrow.ipc.new_stream if kind == "arrow-stream" else pyarrow.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert values(path) == rows


# What XML 1.0 can hold; a workbook's line ends are line feeds, and _x0041_ is its way to write an A.
CELL_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn"]), min_size=1).filter(
    lambda t: "_x" not in t and not t.startswith("=") and "\ufffe" not in t
)
CELL = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(-1e9, 1e9).map(lambda f: float(f"{f:.12g}")).filter(lambda f: not f.is_integer()),  # openpyxl rounds
    CELL_TEXT,
    st.sampled_from(["two\nlines", " spaces ", "007", "\ttab", "1e5", "a,b"]),
)


@settings(MANY, max_examples=30)
@given(
    rows=st.lists(
        st.lists(CELL, min_size=3, max_size=3).filter(lambda r: any(v is not None for v in r)), min_size=1, max_size=5
    )
)
def test_excel(tmp_path, rows):
    book = openpyxl.Workbook()
    for row in [["question", "答案", "third"], *rows]:
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    assert values(tmp_path / "rows.xlsx") == [
        dict(zip(["question", "答案", "third"], row, strict=True)) for row in rows
    ]


def test_excel_sheets_dates_errors_and_blank_rows(tmp_path):
    book = openpyxl.Workbook()
    book.active.title = "first"
    book.active.append(["a", "b"])
    book.active.append([1, 2.0])
    sheet = book.create_sheet("second")
    moment = datetime.datetime(2024, 5, 1, 13, 30)
    for row in (
        [],
        [" when ", "what", None],
        [moment, "x"],
        [],
        [moment.date(), "a\rb_x000D_c"],
        ["#N/A", "y"],
        [1, 2, 3],
    ):
        sheet.append(row)
    book.save(tmp_path / "rows.xlsx")
    assert values(tmp_path / "rows.xlsx") == [{"a": 1, "b": 2}]
    first, second, error, ragged = open_reader(tmp_path / "rows.xlsx", "second").rows()
    assert (first.values, first.source.line) == ({"when": "2024-05-01T13:30:00", "what": "x"}, 3)
    assert (second.values, second.source.line) == ({"when": "2024-05-01", "what": "a\rb\rc"}, 5)
    assert (error.reason, error.line, error.field, error.value) == ("cell_error", 6, "when", "#N/A")
    assert (ragged.reason, ragged.line) == ("ragged_row", 7)
    with pytest.raises(UserError, match=r"no sheet 'third'; the sheets are 'first', 'second'"):
        list(open_reader(tmp_path / "rows.xlsx", "third").rows())


def test_excel_files_that_other_programs_wrote(tmp_path):
    book = openpyxl.Workbook()
    for row in (["a", "b"], [1, 2], [3, 4]):
        book.active.append(row)
    book.save(tmp_path / "right.xlsx")
    with zipfile.ZipFile(tmp_path / "right.xlsx") as right, zipfile.ZipFile(tmp_path / "wrong.xlsx", "w") as wrong:
        for name in right.namelist():
            content = right.read(name)
            assert b'ref="A1:B3"' in content or "sheet1" not in name
            wrong.writestr(name, content.replace(b'ref="A1:B3"', b'ref="A1:A1"').replace(b"<v>4</v>", b"<v>4.0</v>"))
    # By repr: a whole number is an int, however the program that saved it wrote it.
    assert repr(values(tmp_path / "wrong.xlsx")) == "[{'a': 1, 'b': 2}, {'a': 3, 'b': 4}]"


def test_values_that_json_has_no_form_for(tmp_path):
    table = pyarrow.table(
        {
            "day": [datetime.date(2024, 5, 1)],
            "amount": pyarrow.array([1], pyarrow.decimal128(10, 2)),
            "text": pyarrow.array(["茶".encode()], pyarrow.binary()),
            "bytes": pyarrow.array([b"\xff\x00"], pyarrow.binary()),
            "gap": [math.nan],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == [
        {"day": "2024-05-01", "amount": 1, "text": "茶", "bytes": {"base64": "/wA="}, "gap": None}
    ]


# --- as when held whole ---


def outcome(rows):
    """What reading gives, in a form that two readers can be compared by."""
    try:
        return [
            (r.values, r.source) if isinstance(r, Row) else (r.line, r.reason, r.message.split(": ")[0]) for r in rows
        ]
    except UserError as error:
        return error.where, error.what.split(":")[0]


LINE = st.one_of(
    st.builds(json.dumps, st.dictionaries(TEXT, VALUE, max_size=3), ensure_ascii=st.booleans()),
    st.sampled_from(
        [
            '{"a": NaN}',
            '{"a": -Infinity}',
            '{"a": 1e999}',
            '{"a": ' + "9" * 5000 + "}",
            '{"a": 1, "a": 2}',
            '{"b": {"a": 1, "a": NaN}}',
            '{"a": "\\ud83d"}',
            '{"a": "\\ud83d\\ude42"}',
            '{"a": ["\\uDE42\\uD83D"]}',
            '{"a": "\\\\ud83d"}',
            '{"a": "half',
            '{"a": "tab\there"}',
            '{"a": 1} {"b": 2}',
            '{"a": 1,}',
            '{"a"}',
            "{",
            "}",
            "",
            " ",
            "null",
            "NaN",
            "[1]",
            "[{}]",
            '"text"',
            "1",
            "\ufeff{}",
            "{'a': 1}",
            '{"a": tru',
            '{"a": 01}',
            '{"a": "\\x"}',
            "[" * 2000,
        ]
    ),
)


@settings(MANY, max_examples=150)
@given(
    lines=st.lists(LINE, min_size=1, max_size=6),
    kind=st.sampled_from(["json", "jsonl"]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_json_reads_as_when_held_whole(tmp_path, lines, kind, ending):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(ending.join(lines).encode())
    assert outcome(read_rows(path)) == outcome(reference_reader.read_rows(path))


@settings(MANY, max_examples=150)
@given(
    items=st.lists(LINE, max_size=4),
    around=st.sampled_from(["[{}]", "[{}", '{{"data": [{}]}}', '{{"x": [{}], "n": 1}}', '{{"x": {}}}', "[{}] 1"]),
)
def test_a_json_document_reads_as_when_held_whole(tmp_path, items, around):
    path = tmp_path / "rows.json"
    path.write_bytes(around.format(",\n ".join(items)).encode())
    wanted = outcome(reference_reader.read_rows(path))
    got = outcome(read_rows(path))
    if "nested" in str(wanted):  # Where it's too deep, no place is named; the first fault wins.
        assert isinstance(got, tuple)
    else:
        assert got == wanted


@settings(MANY, max_examples=150)
@given(text=st.text('ab"""\',;\t|\n\r 茶', min_size=1, max_size=40), kind=st.sampled_from(["csv", "tsv"]))
def test_a_table_reads_as_when_held_whole(tmp_path, text, kind):
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(text.encode())
    assert outcome(read_rows(path)) == outcome(reference_reader.read_rows(path))


ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "gb18030",
    "big5",
    "shift-jis",
    "latin-1",
]


@settings(MANY, max_examples=150)
@given(
    text=st.text('ab{}": \n茶是什么？種飲料ねこé🙂\ue000', max_size=60),
    encoding=st.sampled_from(ENCODINGS),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=2)), max_size=2),
)
def test_the_encoding_is_the_one_of_the_whole(tmp_path, text, encoding, damage):
    content = text.encode(encoding, "ignore")
    for place, more in damage:
        at = int(place * len(content))
        content = content[:at] + more + content[at + 1 :]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    try:
        wanted = reference_reader.read_text(path)
    except UserError as error:
        with pytest.raises(UserError) as caught:
            find_encoding(path)
        # The reference counts from behind a byte order mark.
        assert re.sub(r"byte \d+", "", caught.value.what) == re.sub(r"byte \d+", "", error.what)
        assert caught.value.where.startswith(str(error.where))
        return
    reader = open_reader(path)
    assert reader.encoding == wanted[1]
    with reader.open(newline="") as stream:
        assert stream.read() == wanted[0]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-8-sig"])
def test_an_encoding_that_breaks_late_names_the_byte_and_the_line(tmp_path, encoding):
    line = '{"prompt": "茶是什么？", "response": "一种饮料。"}\n'.encode(encoding)
    good = line * (3 * 2**20 // len(line))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + b"\xff\xfe\xff\xdf\xff\n")
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert f"{path}:" in caught.value.where and "byte" in caught.value.what
    if encoding == "utf-8":
        assert (
            caught.value.where == f"{path}:{good.count(10) + 1}" and f"byte {len(good):,} is 0xff" in caught.value.what
        )


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_broken_character_between_two_pieces_is_told_by_its_own_place(tmp_path, cut):
    before = b"\n" * 10 + b"a" * (2**20 - 10 - cut)
    path = tmp_path / "rows.csv"
    path.write_bytes(before + "茶".encode()[:2] + b"\xff\xff")
    with pytest.raises(UserError, match=f"byte {len(before):,} is 0xe8") as caught:
        find_encoding(path)
    assert caught.value.where == f"{path}:11"
    path.write_bytes(before + "茶".encode() + b"\xff\n\n\n")
    with pytest.raises(UserError, match=f"byte {len(before) + 3:,} is 0xff") as caught:
        find_encoding(path)
    assert caught.value.where == f"{path}:11"


def test_one_late_chinese_line_decides_for_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "response": "b"}\n' * 100_000 + '{"prompt": "茶是什么", "response": "好"}'.encode("gb18030")
    )
    assert encoding_of(path) == "gb18030"
    assert [row.values["response"] for row in read_rows(path)][-1] == "好"


# --- pieces ---


@settings(MANY, max_examples=100)
@given(content=VALUE, piece=st.integers(1, 7), indent=st.sampled_from([None, 1]))
def test_a_document_in_small_pieces(monkeypatch, content, piece, indent):
    """Every value may be cut anywhere: within a number, a literal, an escape, a key."""
    from io import StringIO

    import luthier.data.readers.document as document

    monkeypatch.setattr(document, "_PIECE", piece)
    text = json.dumps([content, 12.5e-3, True, "\\ \U0001f642", content], indent=indent)
    taken = Document(StringIO(text))
    assert list(taken.items()) == json.loads(text)
    taken.end()


def test_late_columns_are_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = ['{"prompt": "a", "response": "b"}'] * 5_000 + [
        '{"prompt": "a", "late": NaN}',
        '{"\\u006cast": 1, "prompt": ""}',
    ]
    path.write_text("\n".join(lines))
    assert open_reader(path).columns() == ["prompt", "response", "last"]
    assert open_reader(path).columns(["prompt"]) == ["prompt", "response"]
    path.write_text("1\n[2]\n")
    assert open_reader(path).columns() is None
    path.write_text("{}\n")
    assert open_reader(path).columns() == []


@settings(MANY, max_examples=100)
@given(lines=st.lists(LINE, min_size=1, max_size=6))
def test_columns_are_those_of_the_rows(tmp_path, lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(["{}", *lines]).encode())
    rows = [row for row in read_rows(path) if isinstance(row, Row)]
    wanted = list(dict.fromkeys(key for row in rows for key in row.values)) if rows else None
    assert open_reader(path).columns() == wanted


def test_rows_that_nothing_could_write_again_are_refused(tmp_path):
    deep = '{"a": ' + "[" * 200 + "]" * 200 + "}"
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join([deep, '{"a": ' + "[" * 90 + "]" * 90 + "}", '{"\\ud83d": 1}', '{"a": "' + "[" * 200 + '"}'])
    )
    first, second, third, fourth = read_rows(path)
    assert isinstance(first, Reject) and "too deeply" in first.message and first.remedy
    assert isinstance(second, Row) and isinstance(fourth, Row)
    assert third.reason == "half_character"


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        ('{"a": 1, "b": [NaN]}', "bad_json", "b"),
        ('{"a": 1, "b": 2, "b": 3}', "duplicate_key", "b"),
        ('{"a": {"c": 2, "c": 3}}', "duplicate_key", "a"),
        ('{"\\ud83d": 1, "\\ud83d": 2}', "duplicate_key", "?"),
        ('{"a": "x", "b": {"c": "\\ud83d"}}', "half_character", "b"),
        ('{"a": "x", "\\udc00": 1}', "half_character", "?"),
    ],
)
def test_a_flaw_is_told_with_its_field_and_the_rows_own_text(tmp_path, kind, value, reason, field):
    path = tmp_path / f"rows.{kind}"
    path.write_text(value if kind == "jsonl" else f'[{{"a": 1}}, {value}]')
    reject = list(read_rows(path))[-1]
    assert (reject.reason, reject.field, reject.value) == (reason, field, repr(value))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("harm", ["cut", "junk", "flipped", "plain", "empty"])
def test_broken_archives(tmp_path, packing, harm):
    random.seed(0)
    text = "".join(json.dumps({"prompt": str(random.random()), "response": "b"}) + "\n" for _ in range(5_000)).encode()
    path = packed(tmp_path / f"rows.jsonl{packing}", text)
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-20],
        "junk": b"junk" + whole,
        "flipped": whole[: len(whole) // 2] + bytes(50) + whole[len(whole) // 2 + 50 :],
        "plain": text,
        "empty": b"",
    }[harm]
    path.write_bytes(broken)
    wanted = "is empty" if harm == "empty" else "cannot be unpacked|is neither UTF-8|not valid JSON"
    with pytest.raises(UserError, match=wanted) as caught:
        rows = list(read_rows(path))
        assert any(isinstance(row, Reject) for row in rows), "damage went unseen"
        raise UserError("not valid JSON", where=str(path), remedy="…")
    assert str(path) in caught.value.where and caught.value.remedy


def test_archives_end_to_end(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'))
    assert values(path) == [{"a": 1}, {"a": 2}]
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"a": 1}\n') + zstandard.compress(b'{"a": 2}\n'))
    assert values(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_file_is_never_held_whole(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = [{"prompt": f"{i} " + "word " * 200, "response": "yes"} for i in range(20_000)]  # 20 MB
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "csv":
        path.write_text("prompt,response\n" + "".join(f"{row['prompt']},yes\n" for row in rows))
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        packed(path, text.encode())
    del rows
    reader = open_reader(path)
    assert reader.columns() == ["prompt", "response"]
    tracemalloc.start()
    try:
        assert sum(1 for _ in reader.rows()) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
