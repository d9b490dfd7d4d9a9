"""A loaded model as lm-evaluation-harness asks it: packed log-probabilities, and answers in batches."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from luthier.data.encode import EncodedExample
from luthier.data.render import RenderError, prompt_text
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError, shorten
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.perplexity import likelihoods_of_examples
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

# What a task may say of its answers, beside how long they are and what ends them.
_DECODING = {field.name for field in dataclasses.fields(Decoding)} - {"seed"}


class HarnessModel(TemplateLM):
    """A decoder, wrapped by PEFT or not, as the harness's ``LM``.

    Texts are cut into tokens as the harness's own backend ``hf`` does it, so that the numbers are the same: special
    tokens are added where the tokenizer adds them, and what is longer than the context loses its beginning. Where
    questions go through a chat template, that alone writes control tokens.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its own.
        chat: whether questions go through its chat template.
        batch_size: prompts answered at once.
        seed: of answers that are drawn by chance.
        progress: told how many requests of a kind are done, of how many.

    Attributes:
        notes: what was done to requests that their scores do not say.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool = False,
        batch_size: int = BATCH_SIZE,
        seed: int = 42,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.chat, self.batch_size, self.seed, self.progress = chat, batch_size, seed, progress
        self.max_length = resolve_max_length(model.config, tokenizer) - VirtualTokens(model).count
        self.max_gen_toks = 256  # the harness's own, of a task that does not say
        self._counts: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} {what}" for what, count in self._counts.items()]

    # -- texts and tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text is predicted from that nothing precedes."""
        own = self.tokenizer.bos_token_id
        return self.eot_token_id if own is None else int(own)

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in its caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text as token ids."""
        if add_special_tokens is None:
            begun = string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
            add_special_tokens = not (self.chat or begun)
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the text that the model answers to, or goes on with.

        Raises:
            UserError: the template refuses them.
        """
        try:
            return self._templated(chat_history, add_generation_prompt)
        except RenderError as error:
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            if len(turns) == len(chat_history):
                raise UserError(str(error), remedy="ask without the chat template") from None
            self._counts["prompts went without their system message, which the chat template refuses"] += 1
            return self._templated(turns, add_generation_prompt)

    def _templated(self, turns: list[dict[str, str]], opens: bool) -> str:
        if opens:
            return prompt_text(self.tokenizer, turns)
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True))

    # -- log-probabilities

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability after its context, and whether each of its tokens is the likeliest.

        Raises:
            UserError: a continuation is empty.
        """
        for request in requests:
            if not request.args[1]:
                raise UserError(
                    f"an answer to score is empty, after {shorten(request.args[0][-200:])}",
                    where=f"task {request.task_name}, row {request.doc_id}",
                    remedy="mend doc_to_choice or doc_to_target of the task, or the row",
                )
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Any]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        found = likelihoods_of_examples(self.model, rows, progress=self.progress)
        return [(float(total), bool(greedy)) for total, greedy in found]

    def _row(self, context: list[int], continuation: list[int]) -> EncodedExample:
        # The last token is predicted and not read, so that one more fits.
        ids = [*context, *continuation][-(self.max_length + 1) :]
        if len(ids) < len(context) + len(continuation):
            self._counts["texts were longer than the model's context and lost their beginning"] += 1
        trained = np.arange(len(ids)) >= len(ids) - len(continuation)
        trained[0] = False
        return EncodedExample(np.array(ids, dtype=np.int32), trained, None, 0)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each text, read through windows that do not overlap where it is a long one."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        texts: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(texts, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += total
        return totals

    # -- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """An answer to each context, up to the first of the texts or tokens that end it.

        A request that comes several times is answered from several seeds, where answers are drawn by chance.

        Raises:
            UserError: a task wants what cannot be kept to.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        seen: Counter[str] = Counter()
        for number, request in enumerate(requests):
            key = json.dumps(request.args, sort_keys=True, default=str)
            groups.setdefault((json.dumps(request.args[1], sort_keys=True), seen[key]), []).append(number)
            seen[key] += 1
        answers: dict[int, str] = {}
        for (_, repeat), numbers in groups.items():
            chosen = [requests[number] for number in numbers]
            answers |= zip(numbers, self._answers(chosen, repeat, len(answers), len(requests)), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _answers(self, requests: list[Instance], repeat: int, before: int, total: int) -> list[str]:
        """Answers to requests of the same settings."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks))
        until, most = settings.pop("until"), settings.pop("max_gen_toks")
        room = self.max_length - most
        where = f"task {requests[0].task_name}, generation_kwargs"
        if room < 1:
            raise UserError(
                f"answers of {most:,} tokens leave no room for a question in a context of {self.max_length:,}",
                where=where,
                remedy="lower max_gen_toks of the task",
            )
        prompts = []
        for request in requests:
            ids = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            if len(ids) > room:
                self._counts["prompts were longer than the model's context and lost their beginning"] += 1
            prompts.append(ids[-room:])
        progress = self.progress
        said = generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=most,
            batch_size=self.batch_size,
            until=until,
            decoding=self._decoding(settings, repeat, where),
            progress=None if progress is None else lambda done, _: progress(before + done, total),
        )
        return [answer.text for answer in said]

    def _decoding(self, settings: dict[str, Any], repeat: int, where: str) -> Decoding:
        if unknown := sorted(set(settings) - _DECODING):
            raise UserError(
                f"{unknown[0]}={settings[unknown[0]]!r} is not known here",
                where=where,
                remedy=f"leave it out; known are until, max_gen_toks, {', '.join(sorted(_DECODING))}",
            )
        if not settings["do_sample"]:
            # Greedy tasks name what only chance would use (temperature: 0).
            settings = {n: v for n, v in settings.items() if n not in ("temperature", "top_k", "top_p")}
        try:
            return Decoding(**settings, seed=self.seed + repeat)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from None
