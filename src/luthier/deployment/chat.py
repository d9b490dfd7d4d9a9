"""A conversation in the terminal with a tuned model, beside its base where that is wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from luthier.data.examples import Message
from luthier.data.render import RenderError, prompt_text
from luthier.deployment.adapters import AdapterSet
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.methods.answering import load_to_answer, place_to_answer
from luthier.models.heads import Head
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELP = (
    "/reset forgets the conversation, /system TEXT sets the system message, /base lets the untouched base answer, "
    "/exit leaves; Ctrl-C stops an answer"
)
_SWITCHING = "/adapter NAME lets that adapter answer, /adapter lists them"


class _Speakers:
    """Who answers: a saved model, or one of several adapters; or the base of either.

    Args:
        path: a run, adapter or model folder, or an embedded model's name; None: adapters are given.
        adapters: run or adapter folders by name, on one base.
    """

    def __init__(self, path: str | None, adapters: Mapping[str, str]) -> None:
        self._saved = None if path is None else load_to_answer(path)
        self._set = AdapterSet.load(adapters) if adapters else None
        if self._set is not None:
            place_to_answer(self._set.model)
        self.based = False
        """Whether the base answers."""

    @property
    def model(self) -> Any:
        """The tuned one, as it stands."""
        return self._holder.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of whoever answers: the base reads as the adapter over it does."""
        return self._holder.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return () if self._set is None else self._set.names

    @property
    def name(self) -> str | None:
        """Of the adapter that answers, or ``base``; None: a saved model does."""
        return "base" if self.based else None if self._set is None else self._set.active

    @property
    def knows_base(self) -> bool:
        """Whether the base is at hand."""
        return self._saved is None or self._saved.kind == "adapter"

    @property
    def base_name(self) -> str | None:
        """The saved model's base, by the name that loads it; None: not known."""
        return None if self._saved is None else self._saved.base_name

    @property
    def _holder(self) -> Any:
        return self._set if self._set is not None else self._saved

    def switch(self, name: str) -> None:
        """Let an adapter answer.

        Raises:
            UserError: there is none of that name.
        """
        if self._set is None:
            raise UserError("there are no adapters to switch", remedy="begin with --adapter NAME=FOLDER")
        self._set.switch(name)
        self.based = False

    def speaking(self, *, base: bool) -> contextlib.AbstractContextManager[Any]:
        """The model that answers, for as long as the context lasts."""
        if not base:
            return contextlib.nullcontext(self.model)
        return self._set.base() if self._set is not None else self._holder.as_base()


def chat(
    path: str | None = None,
    *,
    adapters: Mapping[str, str] | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    compare: bool = False,
    console: Console | None = None,
    input_fn: Callable[[str], str] = input,
) -> list[Message]:
    """Talk until /exit or the end of the input.

    Args:
        path: a run, adapter or model folder, or an embedded model's name; None: adapters are given.
        adapters: run or adapter folders of one base, by the names they are switched by; the first answers at first.
        system: system message.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        compare: the base answers too; the conversation goes on with the tuned model's answers.
        console: where to write.
        input_fn: asks for a line.

    Returns:
        the conversation as it stood at the end.

    Raises:
        UserError: the model cannot be loaded, or its base is unknown and compare is asked for.
    """
    if (path is None) == (not adapters):
        raise UserError(
            "name a model, or adapters, which name their base themselves",
            remedy="chat with RUN, or with --adapter NAME=FOLDER for each adapter and no RUN",
        )
    console = console or Console()
    speakers = _Speakers(path, adapters or {})
    title = path or ", ".join(speakers.names)
    head = Head.of(speakers.model)
    if head.pairs:
        raise UserError(
            f"{title!r} holds an encoder-decoder, which writes a target for each source and holds no conversation",
            remedy="give it sources from Python: luthier.FineTuneEvaluator(model, tokenizer).generate(source)",
        )
    if not head.writes:
        raise UserError(f"{title!r} holds a classifier, which does not answer", remedy="use `luthier classify`")
    turns: list[Message] = []
    with contextlib.ExitStack() as held:
        whole = None
        if compare and not speakers.knows_base:
            if speakers.base_name in (None, path):
                raise UserError(f"{path!r} does not say which model it was tuned from", remedy="chat without --compare")
            whole = held.enter_context(speakers.speaking(base=True))
        help_text = f"{_HELP}; {_SWITCHING}" if adapters else _HELP
        console.print(f"[bold]{title}[/bold]  {help_text}", highlight=False)
        while True:
            try:
                line = input_fn(f"\nyou ({speakers.name})> " if speakers.name else "\nyou> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            command, _, rest = line.partition(" ")
            if line == "/exit":
                break
            if line == "/reset":
                turns = []
                console.print("[dim]forgotten[/dim]")
            elif command == "/system":
                system = rest.strip() or None
                console.print("[dim]system message set[/dim]" if system else "[dim]no system message[/dim]")
            elif command in ("/adapter", "/base"):
                _turn_to(speakers, command, rest.strip(), console)
            elif line.startswith("/"):
                console.print(f"[yellow]unknown command {command}[/yellow]  {help_text}", highlight=False)
            elif line:
                turns.append({"role": "user", "content": line})
                said = _answers(speakers, whole, turns, system, max_new_tokens, temperature, compare, console)
                turns.append({"role": "assistant", "content": said})
    return turns


def _turn_to(speakers: _Speakers, command: str, name: str, console: Console) -> None:
    """/adapter and /base: another one answers from here on, or it is told who could."""
    if command == "/base":
        speakers.based = speakers.knows_base
        told = "the base answers" if speakers.based else "only adapters have their base at hand"
        console.print(f"[dim]{told}[/dim]")
    elif name:
        try:
            speakers.switch(name)
        except UserError as error:
            console.print(f"{error.what}; {error.remedy}", style="yellow", markup=False, highlight=False)
        else:
            console.print(f"{name} answers", style="dim", markup=False, highlight=False)
    else:
        for each in ("base", *speakers.names) if speakers.names else ():
            mark = "*" if each == speakers.name else " "
            console.print(f"{mark} {each}", markup=False, highlight=False)
        if not speakers.names:
            console.print("[dim]no adapters were named; begin with --adapter NAME=FOLDER[/dim]")


def _answers(
    speakers: _Speakers,
    whole: Any | None,
    turns: list[Message],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    compare: bool,
    console: Console,
) -> str:
    """The answer of whoever is asked, after the base's where both are; ``whole`` is a base that is a model apart."""
    tokenizer = speakers.tokenizer
    ids = _prompt_ids(tokenizer, speakers.model, turns, system, max_new_tokens, console)
    if compare and not speakers.based:
        console.print("[bold]base>[/bold] ", end="")
        with contextlib.nullcontext(whole) if whole is not None else speakers.speaking(base=True) as untouched:
            _stream(untouched, tokenizer, ids, max_new_tokens, temperature, console)
    name = speakers.name or ("tuned" if compare else "model")
    console.print(f"{name}> ", style="bold" if speakers.based else "bold green", end="", markup=False, highlight=False)
    with speakers.speaking(base=speakers.based) as model:
        return _stream(model, tokenizer, ids, max_new_tokens, temperature, console)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    turns: list[Message],
    system: str | None,
    room: int,
    console: Console,
) -> list[int]:
    """The conversation as the model reads it; its oldest exchanges go when it no longer fits."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None:
        context -= VirtualTokens(model).count
    before = [{"role": "system", "content": system}] if system else []
    kept = list(turns)
    while True:
        try:
            text = prompt_text(tokenizer, [*before, *kept])
        except RenderError as error:
            raise UserError(str(error), remedy="leave out the system message") from None
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if context is None or len(ids) + min(room, context // 4) <= context or len(kept) <= 1:
            break
        kept = kept[2:]
    if len(kept) < len(turns):
        console.print(f"[dim]the oldest {len(turns) - len(kept)} turns no longer fit and are left out[/dim]")
        del turns[: len(turns) - len(kept)]
    return ids


def _stream(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int, temperature: float, console: Console
) -> str:
    """Write an answer as it comes; Ctrl-C ends it."""
    said = ""
    stop = threading.Event()
    pieces = _pieces(model, tokenizer, ids, limit, temperature, stop)
    try:
        for piece in pieces:
            said += piece
            console.print(piece, end="", highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        stop.set()
        for _ in pieces:
            pass
        console.print(" [dim](stopped)[/dim]", end="")
    console.print()
    return said


def _pieces(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    limit: int,
    temperature: float,
    stop: threading.Event,
) -> Iterator[str]:
    """Texts of an answer, whole characters each."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    class Asked(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stops = stop_tokens(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=temperature > 0,
        **({"temperature": temperature} if temperature > 0 else {}),
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
    )
    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    virtual = VirtualTokens(model)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            virtual.reader.generate(
                **virtual.generation_inputs(prompt),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Asked()]),
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    yield from (piece for piece in streamer if piece)
    worker.join()
    if failure:
        raise failure[0]
