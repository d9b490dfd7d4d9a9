"""Recipe: the one typed configuration of a run.

A recipe is YAML. Every field has a default, a type and a one-line description; an unknown key is an error that
names the nearest right one. Training arguments have Hugging Face's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from rapidfuzz import process

from luthier.data_options import DataSection
from luthier.errors import UserError, shorten
from luthier.method_options import METHODS_BY_NAME, LoraMethod, Method
from luthier.run_options import DeploymentSection, EvaluationSection, ModelSection, TrainingSection
from luthier.section import Section
from luthier.task_options import TASKS_BY_NAME, CausalTask, Task


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
