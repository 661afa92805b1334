"""Classification and segmentation: everything that depends on which of them it is."""

from __future__ import annotations

from pcenet.choices import TaskName
from pcenet.tasks.base import Objective, Task
from pcenet.tasks.classification import Classification
from pcenet.tasks.segmentation import Segmentation

__all__ = ["Objective", "Task", "get_task"]


def get_task(name: TaskName) -> Task:
    """The task of a name."""
    return Classification() if name == "classify" else Segmentation()
