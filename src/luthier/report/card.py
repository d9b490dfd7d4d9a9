"""The model card of a run: what the Hugging Face Hub shows of a folder, and nothing in it that is not known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.methods.saved import parts_of
from luthier.models.catalogue import CATALOGUE
from luthier.report.blocks import Block, Code, Heading, Listing, Table, Text
from luthier.report.content import trained
from luthier.report.evaluation_files import Evaluation
from luthier.report.gather import OWN, Report
from luthier.report.judge_parts import judge_table, judge_verdict
from luthier.report.markdown import render_markdown
from luthier.report.score_parts import against_first, all_scores
from luthier.report.snippets import snippet
from luthier.report.verdict import harmed, helped

# What the hub calls the work; it lists models that write a target for a source under text generation too.
_PIPELINES = {
    "causal_lm": "text-generation",
    "instruction": "text-generation",
    "seq_to_seq": "text-generation",
    "classification": "text-classification",
    "masked_lm": "fill-mask",
}
_USES = {
    "causal_lm": "It answers prompts of the kind that it was trained on.",
    "instruction": "It follows instructions of the kind that it was trained on.",
    "seq_to_seq": "It writes a target for a source, of the kind that it was trained on.",
    "classification": "It tells which class a text is of",
    "masked_lm": "It fills in hidden words, and is a body to tune for other work with texts of this kind.",
}
_PARAMETERS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type",
    "warmup_ratio", "weight_decay", "max_grad_norm",
)  # fmt: skip

# Notes whose counts the judge's table has; their texts hold replies and addresses.
_IN_TABLE = ("judge: of ", "judge: it gave up")


def model_card(report: Report, folder: Path) -> str:
    """The card.

    Args:
        report: the run's.
        folder: where it will stand: with the adapter, or with the whole or merged model.
    """
    from huggingface_hub import ModelCard

    adapter = _is_adapter(report, folder)
    body = render_markdown(report.name, _body(report, adapter))
    # Parsed again, so that what the hub could not read is never written.
    return str(ModelCard(f"---\n{_facts(report, adapter).to_yaml()}\n---\n\n{body}"))


def _is_adapter(report: Report, folder: Path) -> bool:
    if (folder / "config.json").is_file():
        return False
    return (folder / "adapter_config.json").is_file() or (report.saved is not None and report.saved.name == "adapter")


def _pipeline(report: Report) -> str:
    task = report.recipe.get("task", {})
    return "translation" if task.get("src_lang") and task.get("tgt_lang") else _PIPELINES[report.task]


# --- the front matter ---


def _facts(report: Report, adapter: bool) -> Any:
    from huggingface_hub import ModelCardData

    base = hub_id(report.base)
    peft = adapter and report.method != "adapter"
    results = [result for found in report.evaluations for result in _results(report, found)]
    return ModelCardData(
        base_model=base,
        library_name="peft" if peft else "luthier" if adapter else "transformers",
        pipeline_tag=_pipeline(report),
        tags=["luthier", report.method.replace("_", "-"), *(["transformers"] if peft else [])],
        datasets=_datasets(report) or None,
        language=_languages(report) or None,
        eval_results=results or None,
        model_name=report.name if results else None,
    )


def _results(report: Report, found: Evaluation) -> Iterator[Any]:
    """The tuned model's scores, of those of which more or less is better."""
    from huggingface_hub import EvalResult

    hub = _datasets(report) if found.name == OWN and not report.recipe.get("data", {}).get("test") else []
    for line in found.lines:
        value = line.values[found.tuned]
        if value is not None and line.better is not None:
            yield EvalResult(
                task_type=_pipeline(report),
                dataset_type=hub[0] if len(hub) == 1 else "local-rows",
                dataset_name=report.part_of(found),
                # Else the hub's library takes all that has one type for scores of the same rows.
                dataset_split=None if found.name == OWN else found.name,
                metric_type=line.name,
                metric_name=line.label,
                metric_value=value,
            )


def hub_id(name: str) -> str | None:
    """A model's id on the hub; None where it is a folder or a file."""
    if name in CATALOGUE:
        return CATALOGUE[name].origin
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", name) and not Path(name).exists()
    return name if known and not name.endswith(".gguf") else None


def _datasets(report: Report) -> list[str]:
    sources = report.recipe.get("data", {}).get("train", [])
    return [source["path"].removeprefix("hub:") for source in sources if source["path"].startswith("hub:")]


def _languages(report: Report) -> list[str]:
    """Those that the recipe names, as of translations; rows are not judged for it here."""
    task = report.recipe.get("task", {})
    names = [task.get(key) for key in ("src_lang", "tgt_lang")]
    return list(dict.fromkeys(re.split("[-_]", name)[0].lower() for name in names if name))


# --- the text ---


def _body(report: Report, adapter: bool) -> Iterator[Block]:
    base = hub_id(report.base)
    yield Text(_own(trained(report), report), "", "What was trained:")
    verdict, cost = helped(report), harmed(report)
    yield Text(_own(verdict.text, report), "", "Did tuning help?")
    if (judged := judge_verdict(report.comparison)) is not None:
        yield Text(_own(judged.text, report), "", judged.lead)
    yield Text(_own(cost.text, report), "", "Did it harm?")
    yield Heading("How to use it")
    yield Code(snippet(report, adapter=adapter, base=None if report.base in CATALOGUE else base), "python")
    yield from _base_notes(report, adapter)
    yield Heading("Intended use")
    yield Text(_use(report))
    yield Heading("Training data")
    yield from _data(report)
    yield Heading("Training")
    yield _settings(report)
    yield Heading("Evaluation")
    yield from _evaluation(report)
    yield Heading("Limitations")
    yield Listing([_own(line, report) for line in _limits(report)])
    yield Heading("Licence")
    yield Text(_licence(report))


def _base_notes(report: Report, adapter: bool) -> Iterator[Block]:
    if not adapter:
        return
    if report.base in CATALOGUE:
        entry = CATALOGUE[report.base]
        yield Text(
            f"The base is the embedded model {entry.name} of Luthier: {entry.description}. "
            f"luthier models --prepare {entry.name} says where its folder is; the hub's own weights differ by rounding."
        )
    elif hub_id(report.base) is None:
        yield Text("The base was a folder on the machine that trained; its files are not part of this one.")
    if report.recipe.get("method", {}).get("name") == "qlora":
        yield Text(
            "The adapter was trained beside a base whose weights were held in few bits; on the base as it is stored, "
            "answers can differ slightly."
        )
    if hub_id(report.base) is None or report.base in CATALOGUE:
        files = [f"{part}adapter_config.json" for part in _parts(report)]
        if report.base not in CATALOGUE:
            files.append("luthier_base.json")
        yield Text(
            f"The folder that the base had in training stands in {' and '.join(files)}: put the base's id there before "
            "you publish this."
        )


def _parts(report: Report) -> list[str]:
    """Where in an adapter's folder its parts lie: ``lora/`` and ``prefix/`` of a mixture with a prefix, else itself."""
    parts = [] if report.saved is None else parts_of(report.saved)
    return [f"{part.name}/" for part in parts] if len(parts) > 1 else [""]


def _use(report: Report) -> str:
    text = _USES[report.task]
    if report.task != "classification":
        return text
    found = report.comparison
    names = report.saved_record.get("labels") or (found.classes if found is not None else [])
    shown = ", ".join(names[:30]) + (" …" if len(names) > 30 else "")
    return f"{text}: {shown}." if names else f"{text}."


def _data(report: Report) -> Iterator[Block]:
    files = [Path(file["file"]).name for file in report.manifest.get("data", [])]
    yield Text(f"Files: {', '.join(files)}." if files else "The rows came from Python; no file of them is known.")
    keys = ("kept", "refused", "tokens", "trained_tokens")
    rows = [[name, *(f"{part[key]:,}" for key in keys)] for name, part in report.manifest.get("rows", {}).items()]
    yield Table("", ["rows", "kept", "refused", "tokens", "trained tokens"], rows)


def _settings(report: Report) -> Table:
    training = report.recipe.get("training", {})
    plan = report.training.get("plan", {})
    environment = report.manifest.get("environment", {})
    facts = {
        **{f"method.{key}": value for key, value in report.recipe.get("method", {}).items()},
        "learning_rate": plan.get("learning_rate", training.get("learning_rate")),
        **{key: training.get(key) for key in _PARAMETERS},
        "steps": report.training.get("step"),
        "seed": report.manifest.get("seed"),
        "device": ", ".join(environment.get("gpus", [])) or "CPU",
        **environment.get("versions", {}),
    }
    rows = [[key, _own(str(value), report)] for key, value in facts.items() if value not in (None, [], {})]
    return Table("", ["setting", "value"], rows, words=True)


def _evaluation(report: Report) -> Iterator[Block]:
    if not report.evaluations:
        yield Text("It was not evaluated.")
    for found in report.evaluations:
        yield Text(
            f"{report.part_of(found)}: {found.rows:,} rows" + (f"; answers: {found.decoding}" if found.decoding else "")
        )
        yield all_scores(found) if found.base is None else against_first(found, found.tuned)
        for table in judge_table(found):
            yield replace(table, title=_own(table.title, report))
        if found.signatures:
            yield Listing([f"{name}: {signature}" for name, signature in found.signatures.items()])


def _limits(report: Report) -> Iterator[str]:
    yield "It was judged on rows of the kind that it was trained on; of others these numbers say nothing."
    for found in report.evaluations:
        better, worse = found.moved.get(found.tuned, (0, 0))
        if worse:
            yield f"{report.part_of(found)}: {worse:,} rows got worse, beside {better:,} that improved."
        yield from (note for note in found.notes if not note.startswith(_IN_TABLE))
    if report.harm:
        for check in report.harm["checks"]:
            if check["harm"]:
                yield f"{check['label']}: {check['verdict']}"
    else:
        yield "Whether it has forgotten, memorised or refuses more was not measured."
    refused = sum(part.get("refused", 0) for part in report.manifest.get("rows", {}).values())
    if refused:
        yield f"Rows that were refused and not trained on: {refused:,}."
    if not _languages(report):
        yield "No language is stated: none was declared for the rows."


def _licence(report: Report) -> str:
    known = f" The base's is {CATALOGUE[report.base].licence}." if report.base in CATALOGUE else ""
    return (
        "None is stated here: it follows from the licences of the base and of the training data, which whoever "
        f"publishes this must know.{known}"
    )


def _own(text: str, report: Report) -> str:
    """A line without the folders of the machine that trained."""
    return re.sub(r"(?<![\w.:/])(?:/[^\s/'\"]+)+/(?=[^\s/])", "", text.replace(str(report.folder), report.name))
