"""What a model can be tuned for: one file a kind of task, and the registry of them."""

from luthier.tasks import classification, masked_lm, seq_to_seq, writing  # noqa: F401  (registers)
from luthier.tasks.base import Judgement, Task, get_task

__all__ = ["Judgement", "Task", "get_task"]
