"""Lines of Python that load what a run has saved and use it, with nothing of Luthier where none is needed."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from luthier.data.examples import TaskType
from luthier.methods.saved import parts_of
from luthier.models.heads import Head
from luthier.report.gather import Report

NO_TEMPLATE = sha256(b"None").hexdigest()
"""Of a tokenizer without a chat template (see the manifest's chat_template_sha256)."""


def snippet(report: Report, *, adapter: bool, base: str | None) -> str:
    """Code that loads the folder and asks it one thing.

    Args:
        report: the run's.
        adapter: whether the folder holds an adapter and not a whole model.
        base: the base's id on the hub; None: it has none, and a path is left to be filled in.
    """
    task = TaskType(report.task)
    loader = Head(task).loader_name
    if adapter and report.method == "adapter":
        lines = [
            "import torch",
            "from luthier.methods.saved import load_saved  # PEFT has no bottleneck adapters",
            "",
            'saved = load_saved("path/to/adapter")  # this folder',
            "model, tokenizer = saved.model, saved.tokenizer",
        ]
    elif adapter:
        where = f'"{base}"' if base else '"path/to/base"  # the folder of the base model'
        lines = [
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {loader}, AutoTokenizer",
            "",
            f"base = {where}",
            'adapter = "path/to/adapter"  # this folder',
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            f"model = {loader}.from_pretrained(base{_classes(report)})",
            *_more_rows(report),
            *_put_on(report),
        ]
    else:
        lines = [
            "import torch",
            f"from transformers import {loader}, AutoTokenizer",
            "",
            'folder = "path/to/model"  # this folder',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"model = {loader}.from_pretrained(folder).eval()",
        ]
    return "\n".join([*lines, "", *_USES[task](report)])


def _put_on(report: Report) -> list[str]:
    parts = [] if report.saved is None else parts_of(report.saved)
    if len(parts) < 2:
        return ["model = PeftModel.from_pretrained(model, adapter).eval()"]
    lines = [f'model = PeftModel.from_pretrained(model, adapter, subfolder="{part.name}")' for part in parts]
    return [*lines, "model = model.eval()  # both parts belong to it"]


def _classes(report: Report) -> str:
    """What a classifier's head is made with: the adapter holds its weights, and no config."""
    labels = report.saved_record.get("labels")
    if not labels:
        return ""
    kind = ', problem_type="multi_label_classification"' if report.saved_record.get("multi_label") else ""
    return f", num_labels={len(labels)}, id2label={dict(enumerate(labels))!r}{kind}"


def _more_rows(report: Report) -> list[str]:
    if not report.recipe.get("model", {}).get("added_tokens"):
        return []
    return [f"model.resize_token_embeddings({report.saved_record['rows']}, mean_resizing=False)  # tokens were added"]


def _most(report: Report) -> int:
    return int(report.recipe.get("evaluation", {}).get("max_new_tokens", 256))


def _ask(report: Report) -> list[str]:
    if report.manifest.get("chat_template_sha256") == NO_TEMPLATE:
        inputs = 'inputs = tokenizer("TEXT", return_tensors="pt", return_token_type_ids=False)'
        turns: list[str] = []
    else:
        system: Any = report.recipe.get("data", {}).get("system")
        first = f'{{"role": "system", "content": {system!r}}}, ' if system else ""
        turns = [f'messages = [{first}{{"role": "user", "content": "QUESTION"}}]']
        inputs = (
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    if report.recipe.get("method", {}).get("num_virtual_tokens"):
        return [*turns, inputs, *_step_by_step(report)]
    return [
        *turns,
        inputs,
        "with torch.no_grad():",
        f"    output = model.generate(**inputs, max_new_tokens={_most(report)}, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _step_by_step(report: Report) -> list[str]:
    """Greedy answers by ``forward``: see :mod:`luthier.models.virtual` on what PEFT's ``generate`` does."""
    return [
        'ids, begin = inputs["input_ids"], inputs["input_ids"].shape[1]',
        "stops = model.generation_config.eos_token_id",
        "stops = [tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]",
        "with torch.no_grad():  # PEFT 0.21's own generate does not put virtual tokens where they belong",
        f"    for _ in range({_most(report)}):",
        "        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)",
        "        if ids[0, -1].item() in stops:",
        "            break",
        "print(tokenizer.decode(ids[0, begin:], skip_special_tokens=True))",
    ]


def _classify(report: Report) -> list[str]:
    several = bool(report.saved_record.get("multi_label")) or _of_several(report)
    how = "sigmoid()" if several else "softmax(-1)"
    return [
        'inputs = tokenizer("TEXT", return_tensors="pt", return_token_type_ids=False)',
        "with torch.no_grad():",
        f"    scores = model(**inputs).logits[0].{how}",
        "for number, score in enumerate(scores.tolist()):",
        "    print(model.config.id2label[number], round(score, 4))",
    ]


def _of_several(report: Report) -> bool:
    """Whether a text can be of several classes, as a whole model's evaluation says: it has no one confusion matrix."""
    found = report.comparison
    return found is not None and found.kind == "classes" and not found.confusion


def _fill(report: Report) -> list[str]:
    return [
        'inputs = tokenizer(f"TEXT {tokenizer.mask_token} TEXT", return_tensors="pt")',
        "with torch.no_grad():",
        '    logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]',
        "print(tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist()))",
    ]


def _write(report: Report) -> list[str]:
    task = report.recipe.get("task", {})
    forced = ""
    if task.get("tgt_lang"):
        forced = f", forced_bos_token_id=tokenizer.convert_tokens_to_ids({task['tgt_lang']!r})"
    text = f"{task['source_prefix']}TEXT" if task.get("source_prefix") else "TEXT"
    source = f", src_lang={task['src_lang']!r}" if task.get("src_lang") else ""
    tokenizer = [f"tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path{source})"] if source else []
    return [
        *tokenizer,
        f'inputs = tokenizer({text!r}, return_tensors="pt")',
        "with torch.no_grad():",
        f"    output = model.generate(**inputs, max_new_tokens={_most(report)}, do_sample=False{forced})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]


_USES = {
    TaskType.CAUSAL_LM: _ask,
    TaskType.INSTRUCTION: _ask,
    TaskType.CLASSIFICATION: _classify,
    TaskType.MASKED_LM: _fill,
    TaskType.SEQ_TO_SEQ: _write,
}
