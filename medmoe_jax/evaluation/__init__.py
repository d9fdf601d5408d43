"""Tasks, metrics, intervals and reports; a model is known by its `LanguageModel` methods alone."""

from medmoe_jax.evaluation.report import Report, Result
from medmoe_jax.evaluation.run import LanguageModel, evaluate
from medmoe_jax.evaluation.tasks import Item, Task, list_tasks, load_task

__all__ = [
    "Item",
    "LanguageModel",
    "Report",
    "Result",
    "Task",
    "evaluate",
    "list_tasks",
    "load_task",
]
