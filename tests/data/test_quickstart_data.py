"""The shipped rows: made by their script, kept apart by sentence, name and item, and right."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import date
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "records"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_data", FOLDER / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts():
    return {
        part: [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        for part in ("train", "validation", "test")
    }


def test_the_files_are_what_the_script_makes(maker):
    for name, text in maker.files().items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text


def test_there_are_enough_rows_and_none_twice(parts):
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 600, "validation": 60, "test": 80}
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


def test_held_out_sentences_names_and_items_are_never_trained(maker, parts):
    def skeletons(part):
        return set(maker.TEMPLATES[part].strip().split("\n"))

    for other in ("validation", "test"):
        assert not skeletons("train") & skeletons(other)
        trained = " ".join(row["prompt"] for row in parts["train"])
        for row in parts[other]:
            record = json.loads(row["response"])
            for word in [*record["name"].split(), record["item"]]:
                assert not re.search(rf"\b{word}\b", trained), word


def test_every_record_follows_from_its_text(parts):
    for rows in parts.values():
        for row in rows:
            record = json.loads(row["response"])
            assert list(record) == ["name", "item", "quantity", "date", "amount", "currency"]
            assert json.dumps(record, ensure_ascii=False) == row["response"]
            text = row["prompt"]
            assert record["name"] in text and record["item"] in text
            assert re.search(rf"\b{record['quantity']}\b", text)
            day = date.fromisoformat(record["date"])
            month = f"({day:%B}|{day:%b})"
            written = (
                rf"{record['date']}|\b{day.day} {month} {day.year}\b|{month} {day.day}(st|nd|rd|th)?, {day.year}\b"
            )
            assert re.search(written, text), record["date"]
            assert f"{record['amount']:,.2f}".removesuffix(".00") in text
            symbols = {"USD": ("$", "dollars", "USD"), "EUR": ("€", "euros", "EUR"), "GBP": ("£", "pounds", "GBP")}
            assert any(s in text for s in symbols[record["currency"]])
