"""What each child process of shared_prefix.py does: read the rows and measure their prefix; train one side."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from _child import Outcome, Row, Settings
from _prepare import model_place


def prepare(settings: Settings) -> Outcome:
    """Take the rows that the steps need, and count the tokens that all of them begin with.

    Returns:
        the model's ``folder``, ``prefix_tokens``, and ``mean_tokens`` of a row with its prefix.
    """
    from luthier.data.chats import ChatEncoder
    from luthier.data.render import Renderer
    from luthier.models.loading import load_tokenizer

    wanted = settings["steps"] * settings["batch"]
    with Path(settings["data"]).open(encoding="utf-8") as stream:
        records = [json.loads(line) for line in itertools.islice(stream, wanted)]
    if len(records) < wanted:
        raise SystemExit(f"{settings['data']} has {len(records)} rows; the steps need {wanted}")
    rows = [{"prompt": r[settings["prompt_column"]], "answer": r[settings["response_column"]]} for r in records]
    Path(settings["rows"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = model_place(settings["model"])
    encoder = ChatEncoder(
        Renderer(load_tokenizer(folder), system=settings["system"]), max_length=settings["max_length"]
    )
    encoded = encoder.encode(_examples(rows))
    if encoded.rejects:
        raise SystemExit(f"a row cannot be trained on: {encoded.rejects[0].message}")
    ids = [example.input_ids.tolist() for example in encoded.examples]
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids, strict=False)))
    return {"folder": folder, "prefix_tokens": shared, "mean_tokens": sum(map(len, ids)) / len(ids)}


def train(settings: Settings) -> Outcome:
    """Train Luthier on the rows, every one behind the prefix, with ``training.share_prefix`` as the side says."""
    from _child import read_rows
    from _speed_sides import train_luthier

    outcome, _ = train_luthier(
        settings, _examples(read_rows(settings)), system=settings["system"], share_prefix=settings["share_prefix"]
    )
    return outcome


def _examples(rows: list[Row]) -> list[Any]:
    from luthier import TrainingExample

    return [TrainingExample(input=row["prompt"], output=row["answer"]) for row in rows]
