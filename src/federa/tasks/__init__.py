"""Tasks: from a table to tensors, and from a model's outputs to a score."""

from federa.tasks.base import TASKS, Task
from federa.tasks.classification import Classification

__all__ = ["TASKS", "Classification", "Task"]
