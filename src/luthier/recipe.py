"""Recipe: the one typed configuration of a run.

A recipe is YAML. Every field has a default, a type and a one-line description; an unknown key is an error that
names the nearest right one. Training arguments have Hugging Face's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from rapidfuzz import process

from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError, shorten
from luthier.method_options import METHODS_BY_NAME, LoraMethod, Method
from luthier.section import Section
from luthier.task_options import TASKS_BY_NAME, CausalTask, Task


class ModelSection(Section):
    name: str = "smollm2"
    """An embedded model's name (`luthier models`), a local folder, a GGUF file or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the weights while training; auto: bfloat16 where the hardware multiplies it fast, else float32."""
    batching: Literal["auto", "packed", "padded"] = "auto"
    """How examples share a batch: packed end to end without padding, or right-padded; auto: packed where the model
    proves that it can."""
    chat_template: str | None = None
    """A Jinja file to use in place of the model's own chat template."""
    added_tokens: list[str] = Field(default_factory=list)
    """New tokens to add to the vocabulary and train."""


class Columns(Section):
    """Which column of the file holds what. Leave all empty to have the format recognised."""

    prompt: str | None = None
    """Column of the prompt or question."""
    input: str | None = None
    """Column of further input that follows the prompt (Alpaca's `input`)."""
    response: str | None = None
    """Column of the answer."""
    system: str | None = None
    """Column of the system message."""
    messages: str | None = None
    """Column of a list of turns (OpenAI's `messages`, ShareGPT's `conversations`)."""
    tools: str | None = None
    """Column of the tools' JSON schemas."""
    text: str | None = None
    """Column of plain text, all of which is trained."""
    label: str | None = None
    """Column of the class."""
    label_names: dict[str, str] | None = None
    """Names to learn in place of the classes as the column has them, for example {0: negative, 1: positive}; a list
    names 0, 1, 2 and so on."""
    references: str | None = None
    """Column of further right answers (a list), used by evaluation alone."""

    @field_validator("label_names", mode="before")
    @classmethod
    def _by_text(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return value
        return {json.dumps(k) if isinstance(k, bool) else str(k): v for k, v in value.items()}


class Source(Section):
    path: str
    """A file (.json, .jsonl, .ndjson, .csv, .tsv, also .gz and .zst; .parquet, .arrow, .xlsx), a folder, a glob
    (data/*.jsonl), or hub:OWNER/NAME for a Hugging Face data set."""
    columns: Columns | None = None
    """This file's own column mapping, where it differs from data.columns."""
    weight: float | None = Field(None, gt=0)
    """Share of this source among the training rows, relative to the other sources' weights; all of them have one, or
    none."""
    subset: str | None = None
    """Configuration of a hub data set, or sheet of an Excel file."""
    split: str = "train"
    """Split of a hub data set."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Split(Section):
    """Shares taken from the training file for the parts that have no file of their own."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Share of rows kept for validation where data.validation names no file."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share of rows kept for the final evaluation where data.test names no file."""
    strategy: Literal["random", "stratified", "time"] = "random"
    """How rows are dealt: shuffled with the seed; shuffled so that each label keeps its share in every part; or by
    time, the oldest rows for training and the newest for the test."""
    column: str | None = None
    """The column that holds the time, or the class where it's not the label."""
    group_by: str | None = None
    """A column whose equal values stay in one part; prompt for rows that ask the same, near_duplicates for those that
    nearly say the same. Exact copies always stay in one part."""

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no row to train on")
        return self


def _as_list(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


class Step(Section):
    """A cleaner or an augmenter with its options; ``name`` and ``{name: {option: value}}`` are short for it."""

    name: str
    """A built-in one's name; or your own as MODULE:FUNCTION, or FILE.py:FUNCTION from the recipe's folder."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and not {"name", "options"} & set(value):
            ((name, options),) = value.items()
            value = {"name": name, "options": options or {}}
        if isinstance(value, dict) and isinstance(value.get("options"), dict):
            # YAML 1.1 reads the key `on` as true.
            options = {
                "on" if key is True or key == "true" else key: option for key, option in value["options"].items()
            }
            value = {**value, "options": options}
        return value


class DataSection(Section):
    train: list[Source] = Field(default_factory=list)
    """Files to train on."""
    validation: list[Source] = Field(default_factory=list)
    """Files to validate on during training."""
    test: list[Source] = Field(default_factory=list)
    """Files for the final evaluation, never seen in training."""
    benchmarks: list[Source] = Field(default_factory=list)
    """Files that must not be trained on: training rows that are, nearly are or hold one of their rows are refused."""
    columns: Columns = Field(default_factory=Columns)
    """Which column holds what; empty: recognised."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """Where sources have weights: no row is taken twice and the surplus of some is set aside, or every row is taken and
    those of some are repeated."""
    clean: list[Step] = Field(default_factory=list)
    """Cleaners, in their order (docs/steps.md lists them)."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Refuse rows that repeat an earlier one word for word, or nearly."""
    near_threshold: float = Field(0.8, gt=0, le=1)
    """From which similarity (Jaccard, of word n-grams) two rows are nearly the same."""
    augment: list[Step] = Field(default_factory=list)
    """Augmenters; each variant is made by one of them, of training rows alone, after the split."""
    augment_ratio: float = Field(0.1, ge=0)
    """Variants to make, as a share of the training rows."""
    split: Split = Field(default_factory=Split)
    """Shares for the parts without a file of their own."""
    system: str | None = None
    """A system message for every row that has none."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens are trained: every assistant turn, the last one alone, or the whole text."""
    max_length: int | None = Field(2048, ge=8)
    """Longest example, in tokens."""
    truncation: Literal["reject", "cut", "split"] = "reject"
    """What happens to longer ones: refused and listed; cut at max_length (the answer's end is lost); or, for plain
    text alone, split into pieces of max_length."""
    special_tokens_in_text: Literal["reject", "allow"] = "reject"
    """What happens to rows whose text holds the model's control tokens (such as <|im_end|>), which would be read as
    control."""
    on_error: Literal["reject", "raise"] = "reject"
    """A bad row is refused, counted and listed in rejects.jsonl; or stops the run."""
    max_rejected_share: float = Field(0.01, ge=0, le=1)
    """A larger share of refused rows stops the run (one row is always allowed)."""
    shuffle: bool = True
    """Train in a new seeded order each epoch; false: in the file's order."""
    max_examples: int | None = Field(None, ge=1)
    """Train on the first so many rows after shuffling: to try a small slice before the whole."""

    cache: bool = True
    """Keep the encoded rows on disk, where the next run with the same rows, tokenizer and template finds them."""
    num_proc: int | None = Field(None, ge=1)
    """Processes that encode; empty: one a core, where there are rows enough."""

    _listed = field_validator("train", "validation", "test", "benchmarks", "clean", "augment", mode="before")(_as_list)


class TrainingSection(Section):
    num_train_epochs: float = Field(3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int = Field(-1, ge=-1)
    """Optimiser steps in all; -1: as the epochs say."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Examples in one forward pass."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Examples in one forward pass of validation."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes in one optimiser step."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; empty: the method's default (LoRA 2e-4, full 2e-5)."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of the steps over which the learning rate rises from zero."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of warm-up; where above zero it wins over warmup_ratio."""
    weight_decay: float | None = Field(None, ge=0)
    """AdamW's decay of matrices (never of norms and biases); empty: the method's default (LoRA 0, full 0.01)."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's denominator offset."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    gradient_checkpointing: Literal[False, True, "mlp"] = False
    """Recompute in the backward pass instead of keeping: true: whole layers, a third slower, far less memory; mlp: the
    inner values of each layer's MLP alone, the widest ones, for half of that time; whole layers where they aren't
    fused."""
    share_prefix: Literal["auto", "never"] = "auto"
    """Rows of a batch that begin with the same tokens (system text, tools, few-shot examples) compute them once, with
    the same gradients; auto: where at least 16 tokens are shared. Rows then share one dropout mask there."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold the model: each the whole of it, or each a piece of every weight, gradient and moment
    (FSDP2); one process always has the whole."""
    logging_steps: int = Field(1, ge=1)
    """Steps between lines of metrics.jsonl."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between validations; empty: ten times a run, and at its end."""
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; empty: at every validation."""
    save_total_limit: int = Field(2, ge=1)
    """Newest checkpoints kept; the best one is kept besides."""
    predict_with_generate: bool = False
    """At each validation let the model answer some validation rows as well, and score the answers."""
    generation_examples: int = Field(32, ge=1)
    """How many it answers, of the first ones; evaluation.max_new_tokens is the longest answer."""
    metric_for_best_model: str = "loss"
    """What says which validation is best: the loss, or a metric of those answers (json_exact, rougeL and others,
    docs/evaluation.md), where the loss decides between equal ones."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many validations without a better one."""
    load_best_model_at_end: bool = True
    """Save the weights of the best validation, not the last ones."""
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])
    """Trackers of Accelerate: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio."""

    _listed = field_validator("report_to", mode="before")(_as_list)


class JudgeSection(Section):
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, up to and with /v1, where a model says which of two answers is better;
    empty: nobody does."""
    model: str | None = None
    """The judge's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; empty: no key is sent."""
    prompt: str | None = None
    """A file with another prompt than luthier's; it has {question}, {answer_a}, {answer_b}; {reference} if wanted."""
    examples: int | None = Field(None, ge=1)
    """Rows that are judged, of the first ones, by two requests for each model; empty: all."""
    max_tokens: int = Field(2048, ge=1)
    """Longest reply, in tokens."""


class EvaluationSection(Section):
    enabled: bool = True
    """Compare base and tuned on the test rows after training."""
    max_examples: int | None = Field(200, ge=1)
    """Test rows to generate answers for; empty: all."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(BATCH_SIZE, ge=1)
    """Prompts answered at once, fewer where memory would not suffice; with beams, beams."""
    do_sample: bool = False
    """Draw tokens by chance, from the recipe's seed and each prompt; false: the likeliest ones."""
    temperature: float = Field(1.0, gt=0)
    """With do_sample: logits are divided by it; below 1 likely tokens become likelier."""
    top_k: int = Field(0, ge=0)
    """With do_sample: draw among so many likeliest tokens; 0: among all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """With do_sample: draw among the fewest likeliest tokens whose probabilities sum to this; 1: among all."""
    num_beams: int = Field(1, ge=1)
    """Beginnings of an answer that are followed at once; 1: no beam search."""
    length_penalty: float = 1.0
    """With beams: a beam's log-probability is divided by its length to this power; above 0 favours long answers."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No run of so many tokens comes twice in a prompt with its answer; 0: no limit."""
    resume: bool = True
    """Take up answers that an interrupted evaluation has kept; false: ask everything anew."""
    samples: int = Field(3, ge=0)
    """Answers shown side by side."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics beside those that apply to the right answers: a name (docs/evaluation.md), or a function of yours as
    file.py:function."""
    harm: bool = False
    """Measure what tuning has cost as well: forgetting, memorisation, refusals, answers in another language. It takes
    about as long as the comparison; `luthier evaluate RUN --harm` does it later."""
    general: list[Source] = Field(default_factory=list)
    """Rows that should not be forgotten either, beside the general set that comes with luthier; with harm."""
    judge: JudgeSection = Field(default_factory=JudgeSection)
    """A model that judges the answers of base and tuned, in both orders."""

    _listed = field_validator("general", mode="before")(_as_list)

    @model_validator(mode="after")
    def _can_be_decoded(self) -> EvaluationSection:
        self.decoding(0)
        return self

    def decoding(self, seed: int) -> Decoding:
        """How answers are made.

        Raises:
            UserError: two of the options exclude each other.
        """
        return Decoding(
            do_sample=self.do_sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )


class DeploymentSection(Section):
    merge: bool = False
    """Merge the adapter into the base after training, behind the parity gate, into OUTPUT_DIR/merged."""


class Recipe(Section):
    """Everything a run needs."""

    task: Task = Field(default_factory=CausalTask)
    """What the model learns."""
    model: ModelSection = Field(default_factory=ModelSection)
    """The model to tune."""
    data: DataSection = Field(default_factory=DataSection)
    """The examples."""
    method: Method = Field(default_factory=LoraMethod)
    """How the model is changed."""
    training: TrainingSection = Field(default_factory=TrainingSection)
    """The training loop; Hugging Face's names."""
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    """The comparison after training."""
    deployment: DeploymentSection = Field(default_factory=DeploymentSection)
    """What is made of the tuned model."""
    output_dir: str = "runs/luthier"
    """The run folder."""
    seed: int = Field(42, ge=0)
    """Seed of the split, the order of examples, dropout and initial adapter weights."""

    @field_validator("task", "method", "model", "data", mode="before")
    @classmethod
    def _by_one_value(cls, value: Any, info: ValidationInfo) -> Any:
        """``method: full`` is short for ``method: {name: full}``; a method or task without a name is the usual one."""
        section = str(info.field_name)
        if isinstance(value, (str, list)):
            return {_SHORT[section]: value}
        if isinstance(value, dict) and "name" not in value and section in _NAMED:
            return {"name": "lora" if section == "method" else "causal_lm", **value}
        return value

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a YAML recipe, apply ``key=value`` overrides and check it. Relative paths of data files are taken
        from the recipe's own folder.

        Raises:
            UserError: the file is missing or no YAML, a key is unknown, a value has the wrong type.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(
                f"recipe {str(path)!r} does not exist", remedy="write one with `luthier init DATA`"
            ) from None
        except IsADirectoryError:
            raise UserError(f"{str(path)!r} is a folder, not a recipe", remedy="name a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {str(path)!r} cannot be read: {error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise UserError(
                f"not valid YAML: {getattr(error, 'problem', error)}", where=where, remedy="mend this line"
            ) from None
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise UserError(
                f"a recipe must be a mapping of sections, not {type(content).__name__}",
                where=str(path),
                remedy="start from `luthier init DATA`",
            )
        recipe = cls.from_dict(apply_overrides(content, [_from_here(o) for o in overrides]), where=str(path))
        return recipe.with_paths_from(path.parent)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str | None = None) -> Recipe:
        """Check a mapping of sections.

        Raises:
            UserError: a key is unknown or a value has the wrong type.
        """
        try:
            return cls.model_validate(dict(content))
        except ValidationError as error:
            raise _explain(error, where) from None

    def with_paths_from(self, folder: Path) -> Recipe:
        """A copy whose relative data and template paths start at ``folder``."""
        recipe = self.model_copy(deep=True)
        data = recipe.data
        for source in (*data.train, *data.validation, *data.test, *data.benchmarks, *recipe.evaluation.general):
            if not source.path.startswith("hub:"):
                source.path = _anchored(source.path, folder)
        for step in (*data.clean, *data.augment):
            file, colon, function = step.name.rpartition(":")
            if file.endswith(".py"):
                step.name = f"{_anchored(file, folder)}{colon}{function}"
        if recipe.evaluation.judge.prompt:
            recipe.evaluation.judge.prompt = _anchored(recipe.evaluation.judge.prompt, folder)
        if recipe.model.chat_template:
            recipe.model.chat_template = _anchored(recipe.model.chat_template, folder)
        if (folder / recipe.model.name).is_dir() and not Path(recipe.model.name).is_absolute():
            recipe.model.name = str(folder / recipe.model.name)
        return recipe

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


# Sections that are one of several kinds, by their names.
_NAMED: dict[str, dict[str, type[Section]]] = {"method": METHODS_BY_NAME, "task": TASKS_BY_NAME}

# Sections that one value can stand for, by the key that it is then the value of.
_SHORT = {"method": "name", "task": "name", "model": "name", "data": "train"}


def _anchored(path: str, folder: Path) -> str:
    expanded = Path(path).expanduser()
    return str(expanded if expanded.is_absolute() else folder / expanded)


def _from_here(override: str) -> str:
    """A path given on the command line starts at the working folder, not at the recipe's."""
    key, _, value = override.partition("=")
    known = (
        *("data.train", "data.validation", "data.test", "data.benchmarks", "evaluation.general"),
        *("model.chat_template", "model.name", "model", "data", "evaluation.judge.prompt"),
    )
    return f"{key}={Path(value).absolute()}" if key.strip() in known and Path(value).exists() else override


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``section.key=value`` pairs laid over a recipe's content; values are read as YAML.

    Raises:
        UserError: a pair has no ``=`` or walks through a value that is no section.
    """
    content = json.loads(json.dumps(content, default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"override {override!r} is not of the form key=value",
                remedy="for example training.learning_rate=1e-4",
            )
        node = content
        *sections, last = key.strip().split(".")
        for section in sections:
            child = node.setdefault(section, {})
            if isinstance(child, (str, list)) and node is content and section in _SHORT:
                child = node[section] = {_SHORT[section]: child}
            if not isinstance(child, dict):
                raise UserError(f"override {override!r}: {section!r} is a value, not a section")
            node = child
        node[last] = _scalar(text)
    return content


def _scalar(text: str) -> Any:
    """A value from the command line as YAML reads it, and `1e-4` as the number it is (YAML 1.1 wants `1.0e-4`)."""
    try:
        return float(text) if "e" in text.lower() and not text.isalpha() else yaml.safe_load(text)
    except ValueError:
        # A colon makes no mapping here ("FILE.py:FUNCTION"), but braces and brackets do.
        return text if ":" in text and text[0] not in "{[" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _explain(error: ValidationError, where: str | None) -> UserError:
    """The first few problems of a recipe, each named with its key, its value and the nearest right key."""
    problems: list[str] = []
    for item in error.errors()[:5]:
        location = [str(part) for part in item["loc"]]
        kinds = _NAMED.get(location[0], {}) if location else {}
        chosen = None
        if location[1:2] and location[1] in kinds:
            # A union puts the chosen one's name into the path; it is no key of the file.
            chosen = kinds[location.pop(1)]
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            near = _nearest(location, chosen)
            hint = f"; did you mean {near!r}?" if near else ""
            if chosen is not None and any(location[-1] in kind.model_fields for kind in kinds.values()):
                fields = [field for field in chosen.model_fields if field != "name"]
                hint = f"; {chosen.model_fields['name'].default} has {', '.join(fields) or 'none'}"
            problems.append(f"unknown key {key!r}{hint}")
        elif item["type"] == "union_tag_invalid":
            known = ", ".join(kinds)
            problems.append(f"{key}.name: unknown {key} {shorten(item['input'].get('name'))}; known: {known}")
        elif item["type"] == "model_type":
            keys = ", ".join(k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == key)
            problems.append(f"{key or 'recipe'} is a section, not {shorten(item['input'])}: it has {keys}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{key or 'recipe'}: {message[:1].lower()}{message[1:]} (got {shorten(item['input'])})")
    more = error.error_count() - len(problems)
    what = "; ".join(problems) + (f"; and {more} more" if more > 0 else "")
    return UserError(what, where=where, remedy="mend the recipe; its reference is docs/recipe.md")


def _nearest(location: list[str], chosen: type[Section] | None) -> str | None:
    """The known key closest to an unknown one: in its own section first, then anywhere; of methods, the chosen one."""
    keys = list(known_keys())
    if chosen is not None:
        section = location[0]
        keys = [k for k in keys if not k.startswith(f"{section}.")]
        keys += [f"{section}.{field}" for field in chosen.model_fields]
    prefix = ".".join(location[:-1])
    siblings = [k for k in keys if k.rpartition(".")[0] == prefix]
    for candidates, cutoff in ((siblings, 60), (keys, 75)):
        names = {k: k.rpartition(".")[2] for k in candidates}
        found = process.extractOne(location[-1], names, score_cutoff=cutoff)
        if found:
            return str(found[2])
    return None


def known_keys(section: type[Section] = Recipe, prefix: str = "") -> Iterable[str]:
    """Dotted names of every recipe field."""
    for name, info in section.model_fields.items():
        yield prefix + name
        for kind in _sections_of(info.annotation):
            yield from known_keys(kind, f"{prefix}{name}.")


def _sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    found: list[type[Section]] = []
    for part in getattr(annotation, "__args__", ()):
        found.extend(_sections_of(part))
    return found
