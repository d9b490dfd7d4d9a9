"""Damaged files: examples, listed rejects, or one clear error; never anything else, and never a row unaccounted for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import random
import signal
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress

import openpyxl
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import reference_reader
import zstandard

from luthier import DatasetLoader, UserError
from luthier.data.columns import propose
from luthier.data.examples import Reject, TrainingExample
from luthier.data.readers import kind_of
from luthier.data.sources import read_examples

TURNS = [{"role": "user", "content": "茶是什么？"}, {"role": "assistant", "content": "A drink 🙂, “好喝”。"}]
TABLES = [
    [
        {"question": 'What is\n"tea"?', "answer": "A drink; yes, hot."},
        {"question": "茶是什么？", "answer": "一种饮料。"},
    ]
    * 3,
    [
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
        {"instruction": "两数相加", "input": "", "output": "4", "system": ""},
    ]
    * 2,
    [{"review": "好吃", "label": 1}, {"review": "not good", "label": 0}] * 4,
    [{"text": "Plain text, 文本。"}] * 4,
]
NESTED = [
    [{"messages": TURNS, "id": 7}] * 3,
    [
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {}}'},
                {"from": "observation", "value": "{}"},
                {"from": "gpt", "value": "晴"},
            ],
            "tools": '[{"name": "w", "parameters": {}}]',
        }
    ]
    * 2,
    [{"question": "a", "answers": ["b", "c"], "history": [["x", "y"]], "score": 1.5e3}] * 3,
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "big5", "shift-jis"]
KINDS = ["jsonl", "jsonl", "jsonl", "json", "json", "csv", "tsv", "parquet", "arrow", "xlsx"]
PIECES = [
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b"'",
        b",",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(
        b":",
        b"\\",
        b"\\ud83d",
        b"\\u0000",
        b"\\udE42\\ud83d",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b"true",
        b"\x1a",
    ),
    *(
        b"9" * 5000,
        b"[" * 3000,
        b'{"a":' * 3000,
        b"[" * 150 + b"]" * 150,
        b"x" * 200_000,
        b"\x7f\x80\x81",
        b"\xe2\x80\xa8",
    ),
    *(
        b'"a": 1, "a": 2,',
        b'"question": "",',
        b'"messages": [],',
        b'"answer": NaN,',
        b'"label": 1e999,',
        b'"id": "\\ud83d",',
    ),
    *("茶".encode("gb18030"), "茶".encode("big5"), "é".encode("latin-1"), "🙂".encode("utf-16-le")),
]


def whole(rows, kind, draw):
    """A valid file's bytes."""
    if kind in ("jsonl", "json"):
        lines = [json.dumps(row, ensure_ascii=draw.random() < 0.3) for row in rows]
        text = "\n".join(lines)
        if kind == "json" and draw.random() < 0.8:
            content = draw.choice([rows, {"data": rows}, {"rows": rows, "n": 1}, rows[0]])
            text = json.dumps(content, ensure_ascii=False, indent=draw.choice([None, 1]))
        return text.encode(draw.choice(["utf-8"] * 8 + ENCODINGS), "replace")
    if kind in ("csv", "tsv"):
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind == "tsv" else draw.choice(",;|"))
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue().encode(draw.choice(["utf-8"] * 8 + ENCODINGS), "replace")
    buffer = io.BytesIO()
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(row)
        book.save(buffer)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with draw.choice([pyarrow.ipc.new_stream, pyarrow.ipc.new_file])(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


def damaged(content, draw):
    """The bytes with a few of them changed, cut, doubled, or put in another place."""
    for _ in range(draw.choice([0, 1, 1, 1, 1, 2, 5])):
        at, more = (draw.randrange(len(content) + 1) for _ in range(2))
        begin, end = min(at, more), max(at, more)
        short = min(end, begin + draw.randrange(40))
        match draw.randrange(9):
            case 0:
                content = (
                    content[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 4))) + content[at + 1 :]
                )
            case 1:
                content = content[:at]
            case 2:
                content = content[:begin] + content[short:]
            case 3:
                content = content[:begin] + content[begin:short] * draw.randrange(2, 5) + content[short:]
            case 4:
                lines = content.split(b"\n")
                lines.insert(draw.randrange(len(lines)), lines.pop(draw.randrange(len(lines)))[: draw.randrange(60)])
                content = b"\n".join(lines)
            case 5:
                content = (
                    content[:at]
                    + content.decode("utf-8", "ignore")[:50].encode(draw.choice(ENCODINGS), "ignore")
                    + content[at:]
                )
            case _:
                content = content[:at] + draw.choice(PIECES) + content[at:]
    return content


def damaged_inside(content, draw):
    """A workbook, one part of which is damaged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as given, zipfile.ZipFile(buffer, "w") as made:
        names = given.namelist()
        chosen = draw.choice([*names, "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"])
        for name in names:
            made.writestr(name, damaged(given.read(name), draw) if name == chosen else given.read(name))
    return buffer.getvalue()


def make(folder, number, draw):
    kind = draw.choice(KINDS)
    rows = draw.choice(TABLES if kind in ("csv", "tsv", "xlsx") else TABLES + NESTED) * 4
    content = whole(rows, kind, draw)
    content = (damaged_inside if kind == "xlsx" and draw.random() < 0.7 else damaged)(content, draw)
    name = f"{number}.{draw.choice(KINDS) if draw.random() < 0.05 else kind}"
    if draw.random() < 0.2:
        pack, suffix = draw.choice([(gzip.compress, ".gz"), (zstandard.compress, ".zst")])
        content = pack(content)
        name += suffix if draw.random() < 0.95 else ".gz"
        content = damaged(content, draw) if draw.random() < 0.5 else content
    path = folder / name
    path.write_bytes(content)
    return path


@contextmanager
def limit(seconds, path):
    def stop(*_):
        raise TimeoutError(f"{path} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(path):
    """Read one file and account for its rows; what it ended in."""
    error = None
    rows = []
    try:
        reading = read_examples(str(path))
        rows.extend(reading)
        assert reading.rows_in == len(rows) == sum(f.kept + f.refused.total() for f in reading.files)
    except UserError as caught:
        error = caught
        # A file's name stands in the place, or in the message where there is no file.
        assert error.what and error.remedy and str(path) in str(error.where), error
    with suppress(UserError):
        propose(path)
    for row in rows:
        if isinstance(row, Reject):
            assert (row.file, bool(row.reason), bool(row.message)) == (str(path), True, True) and row.line >= 1
            json.dumps([row.message, row.field, row.value, row.remedy], ensure_ascii=False).encode()
        else:
            assert isinstance(row, TrainingExample) and row.source.line >= 1
            fields = [row.input, row.output, row.label, row.messages, row.tools, row.references, row.metadata]
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
            pickle.dumps(row)
    rejects = [row for row in rows if isinstance(row, Reject)]
    if error is None and rejects:
        with pytest.raises(UserError) as first:
            DatasetLoader(on_error="raise").load(path)
        assert first.value.where == f"{path}:{rejects[0].line}"
    kind = kind_of(path)
    if kind and not kind.packing and kind.format in (".json", ".jsonl", ".csv", ".tsv"):
        try:
            counted = len(list(reference_reader.read_rows(path)))
        except UserError:
            assert error is not None, "the plain reader refuses this file"
        except RecursionError:
            pass  # The plain reader's own; it has no bound.
        else:
            # A file can be read and its columns still be of no known format.
            assert len(rows) == counted if error is None else "columns" in str(error) or "preference" in str(error), (
                error
            )
    if error is not None:
        return "error"
    return "rejects" if rejects else "examples"


def run(folder, count, seed):
    draw = random.Random(seed)
    ends = Counter()
    for number in range(count):
        path = make(folder, number, draw)
        with limit(20, path):
            ends[check(path)] += 1
        path.unlink()
    return ends


@pytest.mark.filterwarnings("ignore")
def test_four_hundred_damaged_files(tmp_path):
    ends = run(tmp_path, 400, seed=1)
    # The damage is neither so small that nothing is refused nor so large that nothing is read.
    assert min(ends["error"], ends["rejects"], ends["examples"]) > 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_damaged_files(tmp_path, seed):
    assert run(tmp_path, 1_000, seed=100 + seed).total() == 1_000
