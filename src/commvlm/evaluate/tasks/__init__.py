"""One small file per task: how it is asked, read and scored."""

from .caption import CAPTION
from .mme import MME
from .pointqa import POINTQA
from .pope import POPE
from .rec import REC
from .reg import REG
from .task import Record, Score, Size, Task, as_it_is, unwrap
from .v7w import V7W
from .vqa import VQA

TASKS: dict[str, Task] = {task.name: task for task in (REC, REG, POPE, VQA, CAPTION, MME, POINTQA, V7W)}


def task_named(name: str) -> Task:
    """Raises ValueError for a task that cannot be scored, naming those that can."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r} to evaluate: choose from {', '.join(TASKS)}")
    return TASKS[name]


__all__ = [
    "CAPTION",
    "MME",
    "POINTQA",
    "POPE",
    "REC",
    "REG",
    "TASKS",
    "V7W",
    "VQA",
    "Record",
    "Score",
    "Size",
    "Task",
    "as_it_is",
    "task_named",
    "unwrap",
]
