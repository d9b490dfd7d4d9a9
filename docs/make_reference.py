"""Write docs/recipe.md from the recipe's own fields: ``python docs/make_reference.py``. A test holds them equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from luthier import data_options, recipe, run_options
from luthier.section import Section

SECTIONS: list[tuple[str, type[Section], str]] = [
    (
        "",
        recipe.Recipe,
        "The whole: sections, and two keys of its own. One value stands for a section: `model: smollm2`, "
        "`data: train.jsonl`, `method: full`, `task: instruction`.",
    ),
    *[
        (f"task ({kind.model_fields['name'].default})", kind, (kind.__doc__ or "").strip())
        for kind in get_args(get_args(recipe.Task)[0])
    ],
    ("model", run_options.ModelSection, "The model to tune."),
    ("data", data_options.DataSection, "The examples, and what becomes of them."),
    ("data.train, validation, test and benchmarks", data_options.Source, "Each source: a path, or these keys."),
    ("data.clean and data.augment", data_options.Step, "Each step: a name, `{name: {option: value}}`, or these keys."),
    ("data.columns", data_options.Columns, "Which column holds what. A source may have its own `columns`."),
    ("data.split", data_options.Split, "Shares taken from the training file for parts without a file."),
    *[
        (f"method ({kind.model_fields['name'].default})", kind, (kind.__doc__ or "").strip())
        for kind in get_args(get_args(recipe.Method)[0])
    ],
    ("training", run_options.TrainingSection, "The training loop, with Hugging Face's names."),
    ("evaluation", run_options.EvaluationSection, "The comparison of base and tuned after training."),
    ("evaluation.judge", run_options.JudgeSection, "A model that judges the answers; endpoint and model switch it on."),
    ("deployment", run_options.DeploymentSection, "What is made of the tuned model."),
]


def reference() -> str:
    """The page as Markdown."""
    lines = [
        "# Recipe reference",
        "",
        "Written by `docs/make_reference.py` from the code. Any key can be set on the command line: "
        "`luthier train recipe.yaml training.learning_rate=1e-4 method.r=16`. An unknown key is an error that names "
        "the nearest right one.",
        "",
    ]
    for title, section, about in SECTIONS:
        lines += [f"## {title or 'recipe'}", "", about, "", "| key | type | default | what |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            what = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {what} |")
        lines.append("")
    return "\n".join(lines)


def steps() -> str:
    """The page of cleaners and augmenters as Markdown."""
    from luthier.data.augmentation import augmenters
    from luthier.data.cleaning import cleaners

    lines = [
        "# Cleaners and augmenters",
        "",
        "Written by `docs/make_reference.py` from the code. What they are for and how they join: [data.md](data.md).",
        "",
        "## data.clean",
        "",
        "Each also takes `on`: all (the default), prompt or answer.",
        "",
        "| cleaner | option | default | what |",
        "|---|---|---|---|",
    ]
    for cleaner in cleaners():
        lines.append(f"| `{cleaner.name}` | | | {_cell(cleaner.doc)} |")
        for option in cleaner.options:
            default = "needed" if option.required else f"`{_shown(option.default)}`"
            lines.append(f"| | `{option.name}` | {default} | {_cell(option.doc)} |")
    lines += ["", "## data.augment", "", "| augmenter | option | default | what |", "|---|---|---|---|"]
    for augmenter in augmenters():
        lines.append(f"| `{augmenter.name}` | | | {_cell(augmenter.summary)} |")
        for name, default, what in augmenter.options:
            lines.append(f"| | `{name}` | {f'`{default}`' if default else ''} | {_cell(what)} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "see below"
    return "" if value is None or field.is_required() else f"`{json.dumps(value)}`"


def _type(annotation: Any, metadata: list[Any]) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    choices = [a if isinstance(a, str) else json.dumps(a) for a in get_args(annotation) if isinstance(a, str | bool)]
    if choices:
        return " \\| ".join(f"`{c}`" for c in choices)
    if any(isinstance(a, type) and issubclass(a, Section) for a in get_args(annotation)):
        return "list of files" if annotation == list[data_options.Source] else "section"
    name = str(annotation if get_args(annotation) else annotation.__name__)
    bounds = [f"{sign} {getattr(m, key)}" for m in metadata for key, sign in _SIGNS.items() if hasattr(m, key)]
    return name.replace(" | None", "").replace("|", "\\|") + (f", {', '.join(bounds)}" if bounds else "")


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

if __name__ == "__main__":
    Path(__file__).with_name("recipe.md").write_text(reference(), encoding="utf-8")
    Path(__file__).with_name("steps.md").write_text(steps(), encoding="utf-8")
