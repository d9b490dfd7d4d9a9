"""A model behind an endpoint that says which of two answers is better, asked in both orders.

Models that judge prefer the place of an answer, often the first (Zheng et al., 2023, arXiv:2306.05685, section 3.3): so
each pair is shown twice, and an answer wins where it is preferred in both places. All else is a tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.endpoint import Endpoint
from luthier.errors import UserError
from luthier.evaluation.judge_prompt import JUDGE_PROMPT, check_prompt, filled, read_prompt, read_verdict
from luthier.evaluation.judged import Judged, Judging, Verdict
from luthier.evaluation.question import Question

if TYPE_CHECKING:
    from luthier.run_options import JudgeSection

MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Judge:
    """Who judges, and how it is asked.

    Raises:
        UserError: the prompt lacks what a judge must be shown or told, or ``examples`` is no number of rows.
    """

    endpoint: Endpoint
    """Should be made with ``temperature=0``."""
    prompt: str = JUDGE_PROMPT
    """See :func:`~luthier.evaluation.judge_prompt.check_prompt`."""
    examples: int | None = None
    """How many rows are judged, of the first ones; None: all."""

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.examples is not None and self.examples < 1:
            raise UserError(f"examples={self.examples!r} is no number of rows to judge", remedy="1 or more")

    @classmethod
    def at(
        cls,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        prompt: str | Path | None = None,
        examples: int | None = None,
        max_tokens: int = MAX_TOKENS,
        resume: bool = True,
    ) -> Judge:
        """A judge at an address.

        Args:
            url: of an OpenAI-compatible server, up to and with ``/v1``.
            model: its name there.
            api_key_env: the environment variable that holds the key; None: no key is sent.
            prompt: a file with another prompt.
            examples: see :class:`Judge`.
            max_tokens: longest reply.
            resume: whether replies that were given before are taken up.

        Raises:
            UserError: one of these cannot be used.
        """
        text = JUDGE_PROMPT if prompt is None else read_prompt(prompt)
        endpoint = Endpoint(
            url,
            model,
            api_key_env=api_key_env,
            temperature=0.0,
            max_tokens=max_tokens,
            timeout=300.0,
            cache=None if resume else False,
        )
        return cls(endpoint, text, examples)


def judge_of(section: JudgeSection, *, resume: bool = True) -> Judge | None:
    """The recipe's judge; None: it names none.

    Raises:
        UserError: it cannot be used.
    """
    if section.endpoint is None or section.model is None:
        given = [name for name in ("endpoint", "model", "api_key_env", "prompt") if getattr(section, name) is not None]
        if given:
            raise UserError(
                f"a judge needs endpoint and model, and only {', '.join(given)} is given",
                where="evaluation.judge",
                remedy="name both, as in {endpoint: 'http://localhost:8000/v1', model: my-model}; "
                "evaluation.judge={} leaves the judge out",
            )
        return None
    return Judge.at(
        section.endpoint,
        section.model,
        api_key_env=section.api_key_env,
        prompt=section.prompt,
        examples=section.examples,
        max_tokens=section.max_tokens,
        resume=resume,
    )


def judge_pairs(
    judge: Judge,
    questions: Sequence[str],
    first: Sequence[str],
    other: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Which of two answers to each question is better; answers that are equal are tied without asking.

    Args:
        judge: who says so.
        questions: what was asked.
        first: one answer to each.
        other: the answers that win or lose.
        references: the right answers of each, where there are some.
        progress: told how many requests of all are done.

    Raises:
        UserError: there are not as many of each, or the endpoint cannot be used at all.
    """
    rights = [()] * len(questions) if references is None else references
    if not len(questions) == len(first) == len(other) == len(rights):
        raise UserError(
            f"{len(questions)} questions have {len(first)} and {len(other)} answers and {len(rights)} references",
            remedy="give one of each for each question",
        )
    asked = [i for i in range(len(questions)) if first[i].strip() != other[i].strip()]
    prompts = []
    for i in asked:
        for pair in ((first[i], other[i]), (other[i], first[i])):
            prompts.append(filled(judge.prompt, questions[i], *pair, rights[i]))
    replies = judge.endpoint(
        [[{"role": "user", "content": prompt}] for prompt in prompts], [0] * len(prompts), progress=progress
    )
    verdicts = [Verdict()] * len(questions)
    for place, i in enumerate(asked):
        verdicts[i] = _verdict(replies[2 * place], replies[2 * place + 1])
    return Judged(verdicts)


def judge_models(
    judge: Judge,
    questions: Sequence[Question],
    answers: Sequence[tuple[str, Sequence[str]]],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Judging:
    """Each model's answers beside those of the first; a judge that gives up leaves what it has judged, and why.

    Args:
        judge: who judges.
        questions: what was asked.
        answers: names of models with their answers; the first is the one that others are held against.
        progress: told ``(what, done, total)``.
    """
    usage = judge.endpoint.usage
    found = Judging(judge.endpoint.model, judge.endpoint.base_url, judge.prompt, judge.endpoint.parameters)
    rows = questions[: judge.examples]
    base = answers[0][1]
    try:
        for name, own in answers[1:]:
            found.models[name] = judge_pairs(
                judge,
                [conversation_text(question) for question in rows],
                base[: len(rows)],
                own[: len(rows)],
                [question.references for question in rows],
                progress=None if progress is None else _named(progress, f"judge, {name}"),
            )
    except UserError as error:
        found.error = error
    found.requests, found.kept_replies = usage.requests, usage.cached
    return found


def conversation_text(question: Question) -> str:
    """What was asked, for a judge: the question itself, or every turn under its role where there are several."""
    turns = question.messages
    if len(turns) == 1 and turns[0]["role"] == "user" and not question.tools:
        return str(turns[0].get("content") or "")
    parts = [f"tools:\n{json.dumps(question.tools, ensure_ascii=False)}"] if question.tools else []
    for turn in turns:
        calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
        said = "\n".join(filter(None, (str(turn.get("content") or ""), calls)))
        parts.append(f"{turn['role']}:\n{said}")
    return "\n\n".join(parts)


def _named(progress: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    """In rows, of two requests each."""
    return lambda done, total: progress(what, done // 2, total // 2)


def _verdict(first: str | UserError, swapped: str | UserError) -> Verdict:
    """Of the replies to both orders."""
    both = (first, swapped)
    texts = [None if isinstance(reply, UserError) else reply for reply in both]
    choices = [None if text is None else read_verdict(text) for text in texts]
    refused = [reply for reply in both if isinstance(reply, UserError)]
    problem = f"{refused[0].what}{f' ({refused[0].remedy})' if refused[0].remedy else ''}" if refused else None
    return Verdict((choices[0], choices[1]), (texts[0], texts[1]), problem)
