"""Tasks: from a table to tensors, and from a model's outputs to a score."""

from federa.tasks.base import TASKS, Task
from federa.tasks.classification import Classification
from federa.tasks.ner import NER
from federa.tasks.qa import QA

__all__ = ["NER", "QA", "TASKS", "Classification", "Task"]
