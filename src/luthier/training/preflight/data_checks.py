"""Pre-flight checks that need the rows and the tokenizer alone."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.data.dataset import Dataset, Part
from luthier.data.duplicates import find_copies
from luthier.data.encode import EncodedExample, runs_of
from luthier.data.examples import Source, TrainingExample
from luthier.data.findings import Finding, places
from luthier.data.labels import Classes, label_findings
from luthier.data.lint import contradiction_findings, copy_findings, leaks
from luthier.data.render import NOTES, Rendered, Renderer, special_tokens
from luthier.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows that are decoded and rendered again; more would cost minutes on a million rows and find nothing new.
SAMPLE = 2_000


def check_conversations(recipe: Recipe, dataset: Dataset) -> list[Finding]:
    """All findings about rows that are rendered by a chat template."""
    return [
        *check_rows(recipe, dataset),
        *(_unanswered(dataset) if recipe.task.name == "instruction" else ()),
        *_trained_text(dataset),
        *_opening(dataset),
        *_special_text(recipe, dataset),
        *_cut(dataset),
    ]


def check_rows(recipe: Recipe, dataset: Dataset) -> list[Finding]:
    """What can be found in the rows of any task."""
    findings = [
        *_rows_lost(recipe, dataset),
        *_repetition(dataset.train),
        *_overlap(recipe, dataset),
        *_labels(dataset.train),
    ]
    if not dataset.validation.encoded and dataset.train.encoded:
        findings.append(
            Finding(
                "no_validation",
                "info",
                "there are no validation rows: nothing will tell when the model starts to memorise",
                "name data.validation, or set data.split.validation",
            )
        )
    return findings


def _rows_lost(recipe: Recipe, dataset: Dataset) -> Iterator[Finding]:
    train = dataset.train
    for part in dataset.parts:
        if part.sifted:
            counts = Counter(r.reason for r in part.sifted).most_common()
            yield Finding(
                "rows_sifted",
                "info",
                f"{part.name}: {len(part.sifted):,} of {part.rows_in:,} rows are taken out as the recipe asks: "
                + ", ".join(f"{reason} {n:,}" for reason, n in counts),
                "look at them in rejects.jsonl, once",
                len(part.sifted),
                tuple(f"{r.file}:{r.line}" for r in part.sifted[:5]),
            )
        if not part.rejects:
            continue
        share = len(part.rejects) / max(part.rows_in, 1)
        allowed = share <= recipe.data.max_rejected_share or len(part.rejects) == 1
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(r.reason for r in part.rejects).most_common())
        first = part.rejects[0]
        yield Finding(
            "rows_lost",
            "warning" if allowed else "error",
            f"{part.name}: {len(part.rejects):,} of {part.rows_in:,} rows ({share:.1%}) are refused: {reasons}",
            f"first: {first.message}; {first.remedy or 'mend the rows'}"
            + ("" if allowed else f"; or raise data.max_rejected_share above {share:.3f} if they may go"),
            len(part.rejects),
            tuple(f"{r.file}:{r.line}" for r in part.rejects[:5]),
        )
    if not train.encoded:
        yield Finding(
            "no_rows",
            "error",
            f"no row is left to train on ({train.rows_in:,} read, {len(train.rejects) + len(train.sifted):,} refused)",
            "see rejects.jsonl for each row's reason"
            if train.rejects or train.sifted
            else "the training files hold no row",
        )
    elif not train.trained_tokens:
        yield Finding("no_trained_token", "error", "no token of any row is trained", "give the rows answers")


def _unanswered(dataset: Dataset) -> Iterator[Finding]:
    """Rows of plain text, which would be trained whole, where instructions are to be learnt."""
    for part in (dataset.train, dataset.validation):
        rows = [example.source for example in part.examples if example.is_plain_text]
        if rows:
            yield Finding(
                "no_answer",
                "error",
                f"{part.name}: {len(rows):,} rows have no answer, so there is no instruction to follow",
                "give them answers, or set task: causal_lm, which trains plain text whole",
                len(rows),
                places(rows),
            )


def _sample(part: Part) -> list[tuple[EncodedExample, TrainingExample]]:
    rows = part.encoded
    if len(rows) > SAMPLE:
        rows = random.Random(0).sample(rows, SAMPLE)
    return [(row, part.examples[row.index]) for row in rows]


def _trained_text(dataset: Dataset) -> Iterator[Finding]:
    """Decode what is trained and compare it with the answers, the end-of-turn and the serving prompt."""
    renderer, tokenizer = dataset.renderer, dataset.tokenizer
    assert renderer is not None
    differs, unstopped, prompts, blank = [], [], [], []
    noted: dict[str, list[Source | None]] = defaultdict(list)
    chats = 0
    for row, example in _sample(dataset.train):
        if row.cut or (example.is_plain_text and not row.trained[1:].all()):
            continue
        rendered = renderer.render(example)
        if not example.is_plain_text and renderer.train_on != "all":
            chats += 1
            for note in rendered.notes:
                noted[note].append(row.source)
            if not _ends_turns(row, renderer.ends_of_turn, tokenizer):
                unstopped.append(row.source)
            elif not _says_answers(row, rendered, example, renderer):
                differs.append(row.source)
            if _blank_joins_prompt(rendered, example, renderer):
                blank.append(row.source)
            elif not _prompt_ids_agree(row, rendered, tokenizer):
                prompts.append(row.source)
    if differs:
        yield Finding(
            "trained_text_differs",
            "error",
            "the trained tokens do not decode to the answers",
            "the tokenizer or the chat template changes the text; name another template in model.chat_template",
            len(differs),
            places(differs),
        )
    if chats and renderer.end_of_turn is None:
        yield Finding(
            "no_end_of_turn",
            "warning",
            "the chat template closes an answer with no control token, so the model cannot learn to stop",
            "name a template with an end-of-turn in model.chat_template",
            chats,
        )
    elif unstopped:
        yield Finding(
            "end_of_turn_untrained",
            "error",
            f"the end-of-turn {renderer.end_of_turn!r} of some answers is not trained, so the model would not stop",
            "the template puts text between answer and end-of-turn; name another in model.chat_template",
            len(unstopped),
            places(unstopped),
        )
    if prompts:
        yield Finding(
            "prompt_ids_differ",
            "warning",
            "before an answer, training reads other tokens than serving would (the template rewrites earlier turns, "
            "or a token crosses the border of the answer)",
            "set data.train_on=last_answer if earlier turns are rewritten, or mend the template",
            len(prompts),
            places(prompts),
        )
    if blank:
        yield Finding(
            "answer_begins_blank",
            "warning",
            "answers begin with white space that joins the template's own before it in one token, so before and in "
            "such an answer training reads other tokens than serving would",
            "set data.clean: [normalize_whitespace: {on: answer}], which takes the white space around answers out",
            len(blank),
            places(blank),
        )
    for note, sources in noted.items():
        yield Finding(
            note,
            "info",
            NOTES[note],
            "name another template in model.chat_template if that is not meant",
            len(sources),
            places(sources),
        )


def _ends_turns(row: EncodedExample, ends: frozenset[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    return not ids or all(row.input_ids[stop - 1] in ids for _, stop in runs_of(row.trained))


def _says_answers(row: EncodedExample, rendered: Rendered, example: TrainingExample, renderer: Renderer) -> bool:
    """The trained tokens decode to the trained spans, and those hold the row's own answers, in order."""
    tokenizer = renderer.tokenizer
    said = _squeezed(
        "".join(
            str(tokenizer.decode(row.input_ids[a:b], skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for a, b in runs_of(row.trained)
        )
    )
    if said != _squeezed("".join(rendered.text[a:b] for a, b in rendered.spans)):
        return False
    messages = example.to_chat_format()
    cursor = 0
    for turn in (messages[i] for i in renderer.trained_turns(messages)):
        # Templates that drop the reasoning of earlier turns keep what follows it.
        answer = _squeezed(str(turn.get("content") or ""))
        place = said.find(answer, cursor)
        if place < 0:
            answer = answer.rpartition("</think>")[2]
            place = said.find(answer, cursor)
        if place < 0:
            return False
        cursor = place + len(answer)
    return True


def _squeezed(text: str) -> str:
    """Without white space: decoders of the SentencePiece kind drop a leading space, and nothing else may change."""
    return re.sub(r"\s+", "", text)


def _blank_joins_prompt(rendered: Rendered, example: TrainingExample, renderer: Renderer) -> bool:
    """Whether one token holds the end of a prompt and white space that the row's own answer begins with."""
    messages = example.to_chat_format()
    answers = [str(messages[i].get("content") or "") for i in renderer.trained_turns(messages)]
    borders = [a for (a, _), answer in zip(rendered.spans, answers, strict=True) if answer[:1].isspace()]
    if not borders:
        return False
    offsets = renderer.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return any(a < border < b for a, b in offsets for border in borders)


def _prompt_ids_agree(row: EncodedExample, rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> bool:
    starts = [a for a, _ in runs_of(row.trained)]
    prompt = rendered.prompts[-1]
    if not prompt or not starts:
        return False
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    return starts[-1] == len(ids) and row.input_ids[: len(ids)].tolist() == ids


def _opening(dataset: Dataset) -> Iterator[Finding]:
    """Exactly one beginning-of-sequence where the tokenizer has one that it writes."""
    tokenizer = dataset.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    adds = tokenizer("text").input_ids[:1] == [bos]
    doubled = [row.source for row in dataset.train.encoded if (row.input_ids[:2] == bos).all() and len(row) > 1]
    missing = [row.source for row in dataset.train.encoded if adds and row.input_ids[0] != bos]
    if doubled:
        yield Finding(
            "bos_doubled",
            "error",
            f"rows begin with {tokenizer.bos_token!r} twice",
            "take it out of the chat template or of the text",
            len(doubled),
            places(doubled),
        )
    if missing:
        yield Finding(
            "bos_missing",
            "error",
            f"the tokenizer opens a text with {tokenizer.bos_token!r}, but rows do not begin with it",
            "add {{ bos_token }} at the start of the chat template (model.chat_template)",
            len(missing),
            places(missing),
        )


def _special_text(recipe: Recipe, dataset: Dataset) -> Iterator[Finding]:
    """Rows whose text holds control tokens are refused, unless the recipe allows them; then they are named."""
    if recipe.data.special_tokens_in_text != "allow":
        return
    specials = [t for t in special_tokens(dataset.tokenizer) if t]
    if not specials:
        return
    pattern = re.compile("|".join(map(re.escape, specials)))
    found = [
        e.source
        for part in dataset.parts
        for e in part.examples
        if any(pattern.search(str(m.get("content") or "")) for m in e.to_chat_format())
    ]
    if found:
        yield Finding(
            "special_token_in_text",
            "warning",
            "the text of rows holds control tokens, which the model reads as control "
            "(data.special_tokens_in_text=allow)",
            "remove them unless they are meant",
            len(found),
            places(found),
        )


def _cut(dataset: Dataset) -> Iterator[Finding]:
    for part in dataset.parts:
        cut = [row for row in part.encoded if row.cut]
        if not cut:
            continue
        lost = sum(row.cut for row in cut)
        yield Finding(
            "answer_cut",
            "warning",
            f"{part.name}: {len(cut):,} answers are cut at data.max_length and lose {lost:,} trained tokens, their "
            "end-of-turn among them: the model learns to stop in mid-sentence there",
            "raise data.max_length, or set data.truncation=reject",
            len(cut),
            places(row.source for row in cut),
        )


def _repetition(train: Part) -> Iterator[Finding]:
    yield from copy_findings(train.examples, find_copies(train.examples))
    yield from contradiction_findings(train.examples)


def _overlap(recipe: Recipe, dataset: Dataset) -> Iterator[Finding]:
    """Rows that are held out and trained on."""
    held_out = {part.name: part.examples for part in (dataset.validation, dataset.test)}
    yield from leaks(dataset.train.examples, held_out, recipe.data.near_threshold)


def _labels(train: Part) -> Iterator[Finding]:
    """Imbalance and spelling of classes."""
    classes = Classes()
    for example in train.examples:
        classes.add(example)
    yield from label_findings(classes.counts)
