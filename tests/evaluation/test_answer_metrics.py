"""Numbers, JSON, tool calls and users' own functions as metrics."""

from __future__ import annotations

import copy
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.errors import UserError
from luthier.evaluation.metrics import METRICS, json_exact, json_valid, metric_of, metrics_for, score, tool_calls
from luthier.evaluation.metrics.numeric import answer_number, reference_number
from luthier.evaluation.question import ask

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


# --- numbers ---


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("9 * 2 = <<9*2=18>>18\n#### 18", "18"),
        ("first 5, so #### 1,234.50", "1234.5"),
        ("#### 5\nno, wait\n#### 6\nfor 7 days", "6"),  # the last mark, and its first number
        ("#### Step 2\nso 42", "42"),  # a heading is no mark
        ("#### **$7.**", "7"),
        ("#### 12 ####", "12"),
        ("####", None),
        ("so 9 * 2 = $18.", "18"),
        ("It is 1,000.50 dollars, I think!", "1000.5"),
        ("$1,234,567.89!", "1234567.89"),
        ("一共是５０％。", "50"),
        ("共１，２３４元", "1234"),
        ("有３，５两种", "5"),  # a Chinese comma that divides
        ("答案是−7。", "-7"),
        ("costs -$5", "-5"),
        ("costs $-5", "-5"),
        ("16-3=13 and 10 - 3", "3"),  # a minus between is no sign
        ("13-4", "4"),
        ("- 5", "5"),  # an item of a list
        ("x2 and H2O", None),
        ("version 1.2.3", "1.2"),
        ("1,2,3", "3"),
        ("is $.50", "0.5"),
        ("1e3", "1000"),
        (r"\boxed{42}", "42"),
        ("12345678901234567890.1", "12345678901234567890.1"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(answer, number):
    assert answer_number(answer) == (None if number is None else Decimal(number))


def test_numeric_match_wants_references_that_are_numbers():
    match = METRICS["numeric_match"]
    right = [["so\n#### 1,000"], ["1000.0"], ["#### 5"], ["７"], ["12345678901234567890.1"], ["1", "2"]]
    answers = ["1000.", "#### $1,000", "5.0000001", "it is 7%", "12345678901234567890.2", "2"]
    assert match.applies(right)
    assert match.rows(answers, right).tolist() == [1, 1, 0, 1, 0, 1]
    assert reference_number("it is 5") is None and reference_number("#### 5 apples") is None
    assert "numeric_match" not in score(["5", "5"], ["5", "five"])
    with pytest.raises(UserError, match="numeric_match wants references that are a number"):
        score(["5"], ["five"], more=["numeric_match"])


def test_real_answers_of_gsm8k_are_right_by_themselves(shared_data):
    rows = [json.loads(line)["answer"] for line in (shared_data / "gsm8k_test.jsonl").open(encoding="utf-8")]
    assert len(rows) == 1319
    assert score(rows[:50], rows[:50])["numeric_match"] == 1
    assert METRICS["numeric_match"].applies([[row] for row in rows])
    # As GSM8K's own extract_answer reads them.
    for row in rows:
        assert answer_number(row) == Decimal(row.rpartition("#### ")[2].strip().replace(",", ""))


# --- JSON ---


def test_json_metrics():
    right = ['{"a": 1, "b": [true, null]}'] * 7
    answers = [
        ' {"b":[true,null],\n "a":1.0} ',  # the same in another order and spacing
        '{"a": 1, "b": [1, null]}',  # true is not 1
        '{"a": 1}',
        '```json\n{"a": 1, "b": [true, null]}\n```',  # fenced: no JSON to a parser
        '[{"a": 1}]',
        '{"a": NaN}',
        "",
    ]
    assert json_valid(answers) == pytest.approx(3 / 7)
    assert json_exact(answers, right) == pytest.approx(1 / 7)
    values = score(answers, right)
    assert values["json_valid"] == pytest.approx(3 / 7) and values["json_exact"] == pytest.approx(1 / 7)
    assert METRICS["json_field_f1"].rows(answers, [[r] for r in right]) == pytest.approx(
        [1, 2 / 3, 1 / 2, 1, 0, 0, 0], abs=1e-12
    )
    assert values["json_field_f1"] == pytest.approx(2 * (3 + 2 + 1 + 3) / ((3 + 3 + 1 + 3) + 3 * 7))
    assert "json_valid" not in score(["{}", "{}"], ["{}", "plain"])
    assert json_valid(['{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}"]) == 0.0
    deep = '{"a":' * 900 + "1" + "}" * 900
    assert METRICS["json_field_f1"].score([deep], [deep]) in (0, 1)


def test_fields_are_paths_and_values():
    rows = [
        ('{"a": {"b": 1, "c": 2}}', ['{"a": {"b": 1, "c": 3}}'], 1 / 2),
        ('{"a": 1}', ['{"b": 1}'], 0),
        ('{"a": [1, 2]}', ['{"a": [2, 1]}'], 0),  # a list's order counts
        ('{"a": "1"}', ['{"a": 1}'], 0),
        ('{"a": 1.0}', ['{"a": 1}'], 1),
        ("{}", ["{}"], 1),
        ("no", ["{}"], 0),
        ('{"a": []}', ['{"a": {}}'], 0),
        ('{"a": 1}', ['{"b": 1}', '{"a": 1, "b": 2}'], 2 / 3),  # the nearest reference
        ('Sure:\n```json\n{"a": 1}\n```\nIs it right?', ['{"a": 1}'], 1),
        ('{"a": 1} it is', ['{"a": 1}'], 0),
    ]
    answers, references, expected = zip(*rows, strict=True)
    assert METRICS["json_field_f1"].rows(answers, references) == pytest.approx(list(expected))


def test_field_f1_is_scikit_learns_micro_f1_of_real_calls(shared_data):
    metrics = pytest.importorskip("sklearn.metrics")
    from sklearn.preprocessing import MultiLabelBinarizer

    examples = load_file(shared_data / "glaive_toolcall_en_demo.json").examples
    calls = [c["function"]["arguments"] for e in examples for m in e.messages for c in m.get("tool_calls") or ()]
    flat = [c for c in calls if not any(isinstance(v, dict | list) for v in c.values())]
    said, right = flat[1:], flat[:-1]
    assert len(said) > 100
    fields = [[{f"{k}={v!r}" for k, v in call.items()} for call in some] for some in (right, said)]
    marks = MultiLabelBinarizer().fit([*fields[0], *fields[1]])
    expected = metrics.f1_score(*(marks.transform(some) for some in fields), average="micro")
    texts = [[json.dumps(call) for call in some] for some in (right, said)]
    kept = [i for i, (a, b) in enumerate(zip(right, said, strict=True)) if a and b]  # {} is a field to us
    assert len(kept) == len(said)
    assert 0 < expected < 1
    assert METRICS["json_field_f1"].score(texts[1], texts[0]) == pytest.approx(expected, abs=1e-12)


# --- tool calls ---

F, G = ("f", '{"a": 1}'), ("g", "{}")


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1.0}}\n</tool_call>', [F]),
        ('I look.\n<tool_call>{"name": "g"}</tool_call>\n<tool_call>{"arguments": {"a": 1}, "name": "f"}', [F, G]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [F]),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>", [F]),
        (
            "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><tool_call>g\n</tool_call>",
            [F, G],
        ),
        ('<functioncall> {"name": "f", "arguments": {"a": 1}} <|endoftext|>', [F]),
        ('{"name": "f", "parameters": {"a": 1}}', [F]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}<|eom_id|>', [F, G]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]</s>', [F]),
        (' [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', [F]),  # decoded without the control token
        ('Well. [TOOL_CALLS]f[CALL_ID]123[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', [F, G]),
        (
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [F, G],
        ),
        ('f\n{"a": 1}', [F]),
        ('[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]', [F]),
        ('{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]}', [F]),
        ("", []),
        ("I call nobody.", []),
        ('{"name": "Bob"}', []),
        ("[]", []),
        ("[1]", []),
        ('Sure: {"name": "f", "arguments": {}}', []),  # no tag says that this is a call
        ('<tool_call>{"name": "f", "arguments": {</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": "oops"}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None),
        ('<tool_call>{"arguments": {}}</tool_call>', None),
        ("[TOOL_CALLS]", None),
        ("<tool_call>" + "[" * 100_000, None),
        ('{"a":' * 100_000, []),
    ],
)
def test_calls_are_read_as_templates_write_them(text, calls):
    assert tool_calls(text) == calls


def test_tool_call_match():
    match = METRICS["tool_call_match"]
    both = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "g"}</tool_call>'
    swapped = '<tool_call>{"name": "g"}</tool_call><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    one = '{"name": "f", "parameters": {"a": 1}}'
    twice = f"[{one}, {one}]"
    references = [[both], [one], [one], [twice], ["hello"], ["hello"], [one, "ask"], [one]]
    answers = [swapped, '{"name": "f", "parameters": {"a": 2}}', twice, one, "hi", one, "no call", "<tool_call>{}"]
    assert match.rows(answers, references).tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    # Neither side calls in the fifth row, so that it says nothing of calls.
    assert score(answers, references)["tool_call_match"] == pytest.approx(2 / 7)
    assert match.score(["never"] * 3, [both, one, "hello"]) == 0
    assert match.value(np.zeros((2, 2)), 3).tolist() == [1, 1]  # a resample in which nobody calls
    assert "tool_call_match" not in score(["hi"], ["hello"])


@pytest.mark.parametrize("name", ["hermes", "qwen3", "llama3", "mistral", "deepseek_v31", "glm4", "glm45"])
def test_real_calls_are_found_in_what_each_familys_template_writes(tokenizer, shared_data, name):
    tokens = json.loads((TEMPLATES / "tokens.json").read_text(encoding="utf-8"))[name]
    made = copy.deepcopy(tokenizer)
    made.add_tokens(tokens["added"])
    named = {k: tokens[k] for k in ("bos_token", "eos_token") if tokens[k]}
    made.add_special_tokens({**named, "additional_special_tokens": tokens["special"]})
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    found = 0
    for number, example in enumerate(load_file(shared_data / "glaive_toolcall_en_demo.json").examples[:40], 1):
        calls = [i for i, m in enumerate(example.messages) if m.get("tool_calls")]
        if not calls:
            continue
        messages = example.messages[: calls[0] + 1]
        (reference,) = ask(made, TrainingExample(messages=messages, tools=example.tools), number).references
        ((function, arguments),) = [c["function"].values() for c in messages[-1]["tool_calls"]]
        if name == "glm45":  # it writes texts without quotes
            arguments = {k: int(v) if str(v).isdigit() else v for k, v in arguments.items()}
        right = [(function, json.dumps(arguments, sort_keys=True))]
        assert tool_calls(reference) == right
        # An answer is decoded without control tokens.
        ids = made(reference, add_special_tokens=False)["input_ids"]
        assert tool_calls(made.decode(ids, skip_special_tokens=True)) == right
        found += 1
    assert found > 10


# --- functions ---


def politeness(answer: str, references: list[str]) -> bool:
    return "please" in answer and isinstance(references, list)


def test_a_function_is_a_metric(tmp_path):
    answers, references = ["please do", "do"], ["x", "y"]
    metric = metric_of(politeness)
    assert (metric.name, metric.label, metric.better) == ("politeness", "politeness", "higher")
    assert metric.score(answers, references) == 0.5 and metric.rows(answers, [["x"], ["y"]]).tolist() == [1, 0]
    file = tmp_path / "mine.py"
    file.write_text("import math\nSHARE = 2\ndef word_count(answer, references):\n    return len(answer.split())\n")
    values = score(answers, references, more=[politeness, f"{file}:word_count", "chrf++", "chrf"])
    assert values["politeness"] == 0.5 and values["word_count"] == 1.5 and values["chrf++"] == 0
    assert metric_of("operator.contains").name == "contains"
    assert metric_of(lambda answer, references: np.float32(0.25)).score(answers, references) == 0.25
    assert metric_of(metric) is metric


def test_what_is_wrong_with_a_function_is_named(tmp_path):
    rows = ["a", "b"], [["x"], ["y"]]

    def failing(answer, references):
        return 1 if answer == "a" else 1 / 0

    with pytest.raises(UserError, match=r"(?s)metric failing raised ZeroDivisionError.*row 2, answer 'b'"):
        metric_of(failing).rows(*rows)
    with pytest.raises(UserError, match=r"(?s)raised TypeError.*row 1.*called with the answer"):
        metric_of(lambda answer: 1).rows(*rows)
    for value in (None, "1", float("nan"), float("inf"), [1]):
        with pytest.raises(UserError, match=r"(?s)no finite number.*row 1"):
            metric_of(lambda answer, references, value=value: value).rows(*rows)
    file = tmp_path / "mine.py"
    file.write_text("SHARE = 2\ndef good(answer, references):\n    return 1\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_at_all\n")
    for what, message in (
        ("blue", "did you mean bleu"),
        ("zzzzzz", "take one of bleu, chrf"),
        (3, "a name or a function, not 3"),
        (f"{file}:bad", r"has no function 'bad'(?s:.*)it has good"),
        (f"{file}:SHARE", "is no function"),
        (f"{file}:", "names no function"),
        ("absent.py:f", "there is no file absent.py"),
        (f"{broken}:f", "cannot be imported: ModuleNotFoundError"),
        ("nowhere_at_all.f", "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            metric_of(what)

    def bleu(answer, references):
        return 1

    with pytest.raises(UserError, match="two metrics of the name bleu"):
        metrics_for(rows[1], [bleu])
