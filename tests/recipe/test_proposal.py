"""What `luthier init` says of a file is true of all its rows."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from luthier.data.chats import ChatEncoder
from luthier.data.loader import DatasetLoader
from luthier.data.render import Renderer
from luthier.data.sources import read_examples
from luthier.models.loading import load_tokenizer
from luthier.proposal import propose_recipe
from luthier.recipe import Recipe


@pytest.mark.parametrize("rows", [300, 4_000])
def test_lengths_and_shares(rows, tiny_model_dir, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"Say {i}.", "response": "word " * (80 if i % 5 == 0 else 3 + i % 4)}) + "\n"
            for i in range(rows)
        )
    )
    proposal = propose_recipe(file, model=str(tiny_model_dir), method="lora", recipe_dir=tmp_path)
    encoder = ChatEncoder(Renderer(load_tokenizer(str(tiny_model_dir))))
    lengths = sorted(len(e) for e in encoder.encode(DatasetLoader().load_from_jsonl(file).examples).examples)
    line = next(seen for seen in proposal.seen if "tokens a row" in seen)
    middle, most, longest = (int(n) for n in re.findall(r"\d+ (?=in|at|the)", line))
    assert longest == lengths[-1]
    assert middle == pytest.approx(lengths[len(lengths) // 2], abs=1)
    assert most == pytest.approx(lengths[int(0.99 * len(lengths))], abs=1)
    share = yaml.safe_load(proposal.text)["data"]["split"]["validation"]
    assert share == (0.1 if rows == 300 else 0.07)


def test_a_folder_and_a_pattern_become_one_source(tmp_path, tiny_model_dir):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text('{"prompt": "2 + 2?", "response": "4"}\n' * 3, encoding="utf-8")
    (tmp_path / "rows" / "b.csv").write_text("question,answer\n3 + 3?,6\n", encoding="utf-8")
    for data in (tmp_path / "rows", tmp_path / "rows" / "*"):
        made = propose_recipe(data, model=str(tiny_model_dir), method="lora", recipe_dir=tmp_path)
        (tmp_path / "recipe.yaml").write_text(made.text, encoding="utf-8")
        recipe = Recipe.load(tmp_path / "recipe.yaml")
        assert [example.output for example in read_examples(recipe.data.train[0])] == ["4", "4", "4", "6"]
        assert "4 rows" in made.seen[0] and any("2 files" in line for line in made.seen)
