"""Any local models on tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from luthier.comparing import Named
from luthier.decoding import BATCH_SIZE
from luthier.errors import UserError
from luthier.evaluation.harness import require_harness
from luthier.methods.answering import load_to_answer

if TYPE_CHECKING:
    from luthier.evaluation.harness.benchmark import Benchmark
    from luthier.evaluation.harness.model import HarnessModel


def benchmark_models(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    data: str | None = None,
    shots: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = BATCH_SIZE,
    unsafe_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Benchmark:
    """Ask models tasks of lm-evaluation-harness; weights are loaded one model at a time.

    Args:
        models: run, adapter or model folders, embedded names or hub ids, each perhaps with ``NAME=`` before it. The
            first is the one that others are held against.
        tasks: folders of task files, task files, or names: see :func:`luthier.evaluation.harness.tasks.load_tasks`.
        data: a file of rows to ask in place of a task's own.
        shots: a file of rows that examples are taken from.
        num_fewshot: examples before each question; None: as each task says.
        limit: rows of each task; None: all.
        chat: whether questions go through each model's chat template.
        system: a system message.
        batch_size: prompts answered at once.
        unsafe_code: whether tasks may run code that a model writes.
        progress: told ``(name, done, total)``.

    Raises:
        UserError: the harness isn't installed, a task cannot be asked, or a model cannot be loaded or does not write.
    """
    require_harness()
    named = [Named.of(text) for text in models]
    if not named or len({n.name for n in named}) < len(named):
        raise UserError(
            f"models want names of their own, not {[n.name for n in named]}", remedy="write NAME=PLACE before each"
        )
    for one in named:
        if one.place.startswith(("http://", "https://")):
            raise UserError(
                f"{one.place!r} is an endpoint, which does not say how likely a text is",
                remedy="name local models; `luthier compare` asks endpoints",
            )
    from luthier.evaluation.harness.benchmark import benchmark
    from luthier.evaluation.harness.tasks import load_tasks

    loaded = load_tasks(tasks, data=data, shots=shots, num_fewshot=num_fewshot, limit=limit, unsafe_code=unsafe_code)

    def opened(one: Named) -> Callable[[], contextlib.AbstractContextManager[HarnessModel]]:
        told = None if progress is None else lambda done, total: progress(one.name, done, total)
        return lambda: _loaded(one.place, chat=chat, batch_size=batch_size, progress=told)

    found = benchmark(
        [(one.name, opened(one)) for one in named], loaded, limit=limit, system=system, unsafe_code=unsafe_code
    )
    found.settings["models"] = {one.name: one.place for one in named}
    return found


@contextlib.contextmanager
def _loaded(
    place: str, *, chat: bool, batch_size: int, progress: Callable[[int, int], None] | None
) -> Iterator[HarnessModel]:
    """A model of this machine for as long as it is asked."""
    from luthier.evaluation.harness.model import HarnessModel

    saved = load_to_answer(place)
    if not saved.head.writes:
        raise UserError(
            f"{place!r} does not write: benchmarks are asked of causal language models",
            remedy="use `luthier evaluate RUN`, which judges each task in its own way",
        )
    yield HarnessModel(saved.model, saved.tokenizer, chat=chat, batch_size=batch_size, progress=progress)
