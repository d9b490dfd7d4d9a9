"""Tasks of lm-evaluation-harness: the harness's own numbers, local rows, what changed, and what it says to mistakes."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from luthier.benchmarking import benchmark_models
from luthier.cli import main
from luthier.errors import UserError
from luthier.evaluation.metrics import score
from luthier.models.loading import load_model, load_tokenizer

pytest.importorskip("lm_eval")

from lm_eval import evaluator
from lm_eval import tasks as harness_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from luthier.evaluation.harness.benchmark import benchmark
from luthier.evaluation.harness.model import HarnessModel
from luthier.evaluation.harness.tasks import load_tasks

SUMS = [
    {"question": f"Ann has {n} eggs and buys {2 * n}. How many are there?", "answer": f"{n} + {2 * n}\n#### {3 * n}"}
    for n in range(2, 14)
]
CHOICES = [
    {"question": "什么颜色是天空？", "choices": ["蓝色", "红色", "绿"], "answer": "蓝色"},
    {"question": "What is 2 + 2?", "choices": ["4", "5"], "answer": "A"},
    {"question": "What is 2 + 3?", "choices": ["four", "five", "six and more"], "answer": 1},
    {"question": "Which one flies?", "choices": ["a bird", "a stone"], "answer": "a bird"},
]
TEXTS = [{"text": "The luthier shaves a little from the back of the belly. " * 3}, {"text": "味道很好，送得也快。"}]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Three tasks of three kinds; the harness makes its caches on the way."""
    folder = tmp_path_factory.mktemp("rows")
    shots = write(folder / "shots.jsonl", SUMS[6:])
    found = load_tasks(["gsm8k_local"], data=write(folder / "sums.jsonl", SUMS[:6]), shots=shots, num_fewshot=2)
    found.tasks |= load_tasks(["choices_local"], data=write(folder / "choices.jsonl", CHOICES)).tasks
    found.tasks |= load_tasks(["text_local"], data=write(folder / "texts.jsonl", TEXTS)).tasks
    found.sources |= dict.fromkeys(found.tasks, "here")
    found.tasks["gsm8k_local"].config.generation_kwargs["max_gen_toks"] = 12
    return found


def evaluated(model: LM, found, **options):
    for task in found.tasks.values():
        task.set_fewshot_seed(seed=1234)
    return evaluator.evaluate(model, {"tasks": found.tasks, "groups": {}}, bootstrap_iters=0, **options)


def require_equal(ours, theirs):
    """Scores to 1e-6 (perplexities by logarithm), log-probabilities to 1e-4, what is likeliest and said exactly."""
    for task, values in ours["results"].items():
        for key, value in values.items():
            if isinstance(value, float):
                shown = np.log if "perplexity" in key else float
                assert shown(value) == pytest.approx(shown(theirs["results"][task][key]), rel=1e-6), (task, key)
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (its,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(mine, tuple):
                    assert mine[0] == pytest.approx(its[0], abs=1e-4, rel=1e-4) and mine[1] == its[1]
                else:
                    assert mine == (its if isinstance(its, str) else pytest.approx(its, rel=1e-4))


@pytest.mark.parametrize("context", [2048, 72])
@pytest.mark.parametrize("chat", [False, True])
def test_scores_are_those_of_the_harness_own_backend(terse_model_dir, asked, chat, context):
    """Also where texts are longer than the context, and through a chat template."""
    model, tokenizer = load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir)
    model.config.max_position_embeddings = context
    options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    ours = HarnessModel(model, tokenizer, chat=chat, batch_size=3)
    found = evaluated(ours, asked, **options)
    require_equal(found, evaluated(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3), asked, **options))
    assert {s["arguments"][0][0].count("Question:") for s in found["samples"]["gsm8k_local"]} == {3}
    assert bool(ours.notes) == (context == 72)


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, each, number, ("task", number, 1)) for number, each in enumerate(arguments)]


@pytest.mark.parametrize("method", ["LORA", "PROMPT_TUNING", "PREFIX_TUNING"])
def test_an_adapter_is_what_is_scored(terse_model_dir, method):
    """As PEFT's own forward reads it."""
    import peft

    model, tokenizer = load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir)
    torch.manual_seed(1)
    kinds = {
        "LORA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    pairs = [("One and one is", " two"), ("One and one is", " seven and"), ("", "Nothing before")]
    asked = requests("loglikelihood", *pairs)
    plain = HarnessModel(model, tokenizer).loglikelihood(asked)
    tuned = peft.get_peft_model(model, kinds[method]()).eval()
    ours = HarnessModel(tuned, tokenizer)
    found = ours.loglikelihood(asked)
    assert all(abs(one[0] - other[0]) > 1e-3 for one, other in zip(found, plain, strict=True))
    expected = []
    for text, answer in pairs:
        before = tokenizer(text).input_ids or [ours.prefix_token_id]
        ids = before + tokenizer(answer).input_ids
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)
        expected.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(before), len(ids))))
    assert [total for total, _ in found] == pytest.approx(expected, abs=1e-4)
    with tuned.disable_adapter():
        assert HarnessModel(tuned, tokenizer).loglikelihood(asked) == [
            (pytest.approx(total, abs=1e-4), greedy) for total, greedy in plain
        ]


def test_answers_by_chance_come_from_several_seeds(terse_model_dir):
    model = HarnessModel(load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir))
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": ["\n"]}
    asked = requests("generate_until", *[("Say something", settings)] * 2, ("Another", settings))
    said = model.generate_until(asked)
    assert said[0] != said[1] and said == model.generate_until(asked)
    for wrong, what in (({"penalty_alpha": 0.5}, "penalty_alpha"), ({"max_gen_toks": 4000}, "leave no room")):
        with pytest.raises(UserError, match=what):
            model.generate_until(requests("generate_until", ("Say", {"until": ["\n"], **wrong})))
    with pytest.raises(UserError, match="an answer to score is empty"):
        model.loglikelihood(requests("loglikelihood", ("Say", "")))


class Says(LM):
    """Gives the answers it is given."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests):
        return self.answers

    loglikelihood = loglikelihood_rolling = None


# Answers to a question whose right one is 1,018, and whether they are right by strict-match, flexible-extract and
# luthier's numeric_match.
JUDGED = [
    ("so 1000 + 18\n#### 1018", (1, 1, 1)),
    ("#### 1,018", (1, 1, 1)),
    ("#### 1018.", (1, 1, 1)),
    ("#### 17\n#### 1018", (0, 1, 1)),  # the first mark, the last number, the last mark
    ("#### 1018 of 2000", (1, 0, 1)),
    ("#### $1018", (0, 1, 1)),  # strict-match knows no currency behind the mark
    ("####1018", (0, 1, 1)),
    ("#### 1018.00", (0, 0, 1)),  # texts are compared there, numbers here
    ("It is 1018", (0, 1, 1)),
    ("It is 1018 eggs, not 7", (0, 0, 0)),
    ("#### １０１８", (0, 0, 1)),
    ("", (0, 0, 0)),
]


def test_where_the_metrics_of_gsm8k_differ(tmp_path):
    """Our task judges as the harness's own gsm8k; numeric_match differs from both filters, as documented."""
    answers = [answer for answer, _ in JUDGED]
    row = {"question": "How many?", "answer": "1000 + 18\n#### 1,018"}
    data = write(tmp_path / "sums.jsonl", [row] * len(JUDGED))
    theirs = Path(harness_tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    for name in ("gsm8k_local", str(theirs)):
        found = evaluated(Says(answers), load_tasks([name], data=data, num_fewshot=0))
        (samples,) = found["samples"].values()
        for place, chosen in enumerate(("strict-match", "flexible-extract")):
            judged = [s["exact_match"] for s in samples if s["filter"] == chosen]
            assert judged == [right[place] for _, right in JUDGED], (name, chosen)
    ours = [score([answer], [row["answer"]], more=["numeric_match"])["numeric_match"] for answer in answers]
    assert ours == [right[2] for _, right in JUDGED]


# -- task files and their rows

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: data/rows.jsonl}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
ROWS = [{"question": f"Thing {n}?", "answer": "blue"} for n in range(5)]


@pytest.fixture
def folder(tmp_path):
    """A task and its rows, and a second one that includes it."""
    (tmp_path / "tasks" / "data").mkdir(parents=True)
    write(tmp_path / "tasks" / "data" / "rows.jsonl", ROWS)
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK)
    (tmp_path / "tasks" / "short.yaml").write_text("include: colours.yaml\ntask: short\ndoc_to_text: question\n")
    return tmp_path / "tasks"


def test_a_folder_of_tasks_whose_rows_lie_beside_them(folder, monkeypatch):
    monkeypatch.chdir("/")
    found = load_tasks([str(folder)])
    assert sorted(found.tasks) == ["colours", "short"]
    assert [len(task.eval_docs) for task in found.tasks.values()] == [5, 5]
    assert list(load_tasks([str(folder / "short.yaml")], limit=2).tasks) == ["short"]
    (folder / "twice.yaml").write_text(TASK)
    with pytest.raises(UserError, match=r"another file has its name(.|\n)*twice\.yaml"):
        load_tasks([str(folder)])


def broken(folder: Path, old: str, new: str) -> str:
    (folder / "short.yaml").unlink()
    (folder / "colours.yaml").write_text(TASK.replace(old, new))
    return str(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{question}}", "{{frage}}", "no column 'frage'; theirs are question, answer"),
        ('"{{answer}}"', "antwort", "no column 'antwort', which doc_to_target names(.|\n)*row 1"),
        ("data/rows.jsonl", "data/gone.jsonl", "rows are not there: data/gone.jsonl(.|\n)*task file's folder"),
        ("data_files: {test: data/rows.jsonl}", "data_files: {test: [1]}", "1 names no file"),
        ("output_type", "output_type: [", "no YAML(.|\n)*colours.yaml:6"),
        ("task: colours", "- colours", "no YAML|no `key: value` lines"),
        ("task: colours", "label: colours", "no task is defined there"),
        ("task: colours", "task: colours\ninclude: gone.yaml", "'colours' is not taken: what it includes is missing"),
        ("test_split: test", "test_split: validation", "'validation', which is not there"),
        ("test_split: test", "test_split: test\ncolour: blue", "unexpected keyword argument 'colour'"),
        ("metric: exact_match", "metric: no_such_metric", "there is no metric 'no_such_metric'"),
        ("task: colours", "task: colours\nunsafe_code: true", "runs code that the model writes"),
        ("test_split: test", "test_split: test\nnum_fewshot: 9", "shows 9 examples(.|\n)*5 rows"),
        ("dataset_path: json", "dataset_path: nobody/nothing", "rows .nobody/nothing. are not on this machine"),
    ],
)
def test_what_is_wrong_with_a_task(folder, old, new, message):
    with pytest.raises(UserError, match=message):
        load_tasks([broken(folder, old, new)])


def test_a_row_that_does_not_fit_is_named(folder):
    write(folder / "data" / "rows.jsonl", [*ROWS, {"question": "Thing 6?", "answer": None}])
    where = broken(folder, '"{{answer}}"', "answer")
    with pytest.raises(UserError, match=r"colours\.yaml, row 6"):
        load_tasks([where])
    load_tasks([where], limit=5)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["gsm8k_local"], {}, "comes without rows"),
        (["gsm8k_local"], {"data": "gone.jsonl"}, "there is no file 'gone.jsonl'"),
        (["gsm8k_local"], {"data": "rows.xlsx"}, "not read from .xlsx"),
        (["gsm8k_local"], {"data": "rows.jsonl", "num_fewshot": 3}, "no file of them is named(.|\n)*--shots"),
        (["gsm8k_local"], {"shots": "rows.jsonl"}, "of no use alone"),
        (["text_local"], {"data": "rows.jsonl"}, "no column 'text'; theirs are question, answer"),
        (["gone.yaml"], {}, "no task file or folder"),
        (["gsm8k_local", "gsm8k_local"], {"data": "rows.jsonl"}, "two tasks are called"),
    ],
)
def test_what_is_wrong_with_what_is_asked(folder, monkeypatch, names, options, message):
    monkeypatch.chdir(folder / "data")
    with pytest.raises(UserError, match=message):
        load_tasks(names, **options)


# -- several models, and the command line


def test_a_perplexity_that_no_number_holds(terse_model_dir, tmp_path):
    task = tmp_path / "words.yaml"
    task.write_text(
        "task: words\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        "doc_to_target: text\nmetric_list: [{metric: word_perplexity, aggregation: weighted_perplexity}]\n"
    )
    tasks = load_tasks([str(task)], data=write(tmp_path / "texts.jsonl", [{"text": "味道很好" * 30}]))
    model = HarnessModel(load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir))
    with pytest.raises(UserError, match="leave word_perplexity out"):
        benchmark([("one", lambda: contextlib.nullcontext(model))], tasks)


def test_what_changed_row_by_row(terse_model_dir, asked):
    """Scores and errors are the harness's; changes are paired, and none where a number is no sum of rows."""
    model, tokenizer = load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir)

    @contextlib.contextmanager
    def opened(sign):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(sign)
        yield HarnessModel(model, tokenizer)

    found = benchmark([("base", lambda: opened(1)), ("other", lambda: opened(-1))], asked)
    base, other = found.models
    assert not base.changes and set(other.changes) == set(other.scores)
    for key in (("choices_local", "acc", "none"), ("text_local", "bits_per_byte", "none")):
        one, two = base.scores[key], other.scores[key]
        assert other.changes[key].value == pytest.approx(two.value - one.value, rel=1e-9)
        rows = [s[key[1]] for s in other.samples[key[0]]]
        assert len(rows) == len(two.measure.rows)
    acc = base.scores["choices_local", "acc", "none"]
    rows = acc.measure.rows
    assert acc.stderr == pytest.approx(rows.std(ddof=1) / len(rows) ** 0.5)
    change = other.changes["choices_local", "acc", "none"]
    assert change.wins + change.ties + change.losses == len(CHOICES)
    bits = other.changes["text_local", "bits_per_byte", "none"]
    before, after = (model.scores["text_local", "bits_per_byte", "none"].measure.rows for model in found.models)
    assert (bits.wins, bits.losses) == (int((after < before).sum()), int((after > before).sum()))
    told = found.to_json()
    assert json.dumps(told) and told["tasks"]["choices_local"]["rows"] == 4
    assert told["rows"]["choices_local"][0]["models"]["base"]["acc"] in (0.0, 1.0)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was asked: {args!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_command_line(terse_model_dir, folder, tmp_path, monkeypatch, capsys, no_network):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", "benchmark", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    tokenizer = load_tokenizer(terse_model_dir)
    code, out, err = run(
        f"one={terse_model_dir}", f"two={terse_model_dir}", "--tasks", f"{folder},{folder / 'colours.yaml'}"
    )
    assert code == 2 and "two tasks are called 'colours'" in err
    written = tmp_path / "found.json"
    code, out, err = run(
        *(f"one={terse_model_dir}", f"two={terse_model_dir}", "--tasks", folder, "--limit", 3, "-o", written),
        *("--apply-chat-template", "--system", "Be short."),
    )
    assert code == 0, err
    assert "two beside one" in out and "colours: version 2.0, 0 examples, 3 of 5 rows" in out
    found = json.loads(written.read_text(encoding="utf-8"))
    assert found["models"]["two"]["changes"]["colours"]["exact_match,none"]["value"] == 0
    prompt = found["rows"]["colours"][2]["models"]["one"]["arguments"][0][0]
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Thing 2?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert found["settings"]["models"]["two"] == str(terse_model_dir) and found["models"]["two"]["dtype"] == "float32"
    assert len(found["tasks"]["colours"]["config_hash"]) == 64 and "lm_eval" in found["versions"]


def test_models_that_cannot_be_asked(terse_model_dir, tiny_encoder_dir, folder, tmp_path, monkeypatch):
    where = str(folder / "colours.yaml")
    classifier = str(tmp_path / "classifier")
    BertForSequenceClassification.from_pretrained(tiny_encoder_dir).save_pretrained(classifier)
    load_tokenizer(tiny_encoder_dir, chats=False).save_pretrained(classifier)
    for models, message in (
        ([str(terse_model_dir), "http://localhost:1/v1#m"], "an endpoint"),
        ([str(terse_model_dir)] * 2, "names of their own"),
        ([classifier], "does not write"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark_models(models, [where])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'luthier\[harness\]'"):
        benchmark_models([str(terse_model_dir)], [where])


@pytest.mark.slow
def test_tasks_that_the_harness_brings(shared_data):
    """To look through its fourteen thousand files takes up to half a minute."""
    with pytest.raises(UserError, match="near it are gsm8k_local"):
        load_tasks(["gsm8k_lokal"])
    with pytest.raises(UserError, match=r"are not on this machine(.|\n)*--download"):
        load_tasks(["gsm8k"])
    rows = {"data": str(shared_data / "gsm8k_test.jsonl"), "shots": str(shared_data / "gsm8k_train.jsonl")}
    (task,) = load_tasks(["gsm8k"], **rows, limit=4).tasks.values()
    assert task.config.num_fewshot == 5 and len(task.eval_docs) == 1319
