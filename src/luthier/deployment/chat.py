"""A conversation in the terminal with a tuned model, beside its base where that is wanted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from luthier.data.examples import Message
from luthier.data.render import RenderError, prompt_text
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.methods.answering import load_to_answer
from luthier.methods.saved import SavedModel
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELP = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer"


def chat(
    path: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    compare: bool = False,
    console: Console | None = None,
    input_fn: Callable[[str], str] = input,
) -> list[Message]:
    """Talk until /exit or the end of the input.

    Args:
        path: a run, adapter or model folder, or an embedded model's name.
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
    console = console or Console()
    saved = load_to_answer(path)
    if saved.head.pairs:
        raise UserError(
            f"{path!r} holds an encoder-decoder, which writes a target for each source and holds no conversation",
            remedy="give it sources from Python: luthier.FineTuneEvaluator(model, tokenizer).generate(source)",
        )
    if not saved.head.writes:
        raise UserError(f"{path!r} holds a classifier, which does not answer", remedy="use `luthier classify`")
    if compare and saved.kind == "model" and saved.base_name in (None, path):
        raise UserError(f"{path!r} does not say which model it was tuned from", remedy="chat without --compare")
    turns: list[Message] = []
    console.print(f"[bold]{path}[/bold]  {_HELP}", highlight=False)
    with contextlib.ExitStack() as held:
        base = held.enter_context(saved.as_base()) if compare and saved.kind == "model" else None
        while True:
            try:
                line = input_fn("\nyou> ").strip()
            except (EOFError, KeyboardInterrupt):
                break
            if line == "/exit":
                break
            if line == "/reset":
                turns = []
                console.print("[dim]forgotten[/dim]")
            elif line.startswith("/system"):
                system = line.removeprefix("/system").strip() or None
                console.print("[dim]system message set[/dim]" if system else "[dim]no system message[/dim]")
            elif line.startswith("/"):
                console.print(f"[yellow]unknown command {line.split()[0]}[/yellow]  {_HELP}", highlight=False)
            elif line:
                turns.append({"role": "user", "content": line})
                said = _answers(saved, base, turns, system, max_new_tokens, temperature, compare, console)
                turns.append({"role": "assistant", "content": said})
    return turns


def _answers(
    saved: SavedModel,
    base: Any | None,
    turns: list[Message],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    compare: bool,
    console: Console,
) -> str:
    """The tuned model's answer, after the base's where both are asked."""
    ids = _prompt_ids(saved.tokenizer, saved.model, turns, system, max_new_tokens, console)
    if compare:
        console.print("[bold]base>[/bold] ", end="")
        with contextlib.nullcontext(base) if base is not None else saved.as_base() as untouched:
            _stream(untouched, saved.tokenizer, ids, max_new_tokens, temperature, console)
    console.print("[bold green]tuned>[/bold green] " if compare else "[bold green]model>[/bold green] ", end="")
    return _stream(saved.model, saved.tokenizer, ids, max_new_tokens, temperature, console)


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
