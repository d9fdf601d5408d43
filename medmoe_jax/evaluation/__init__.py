"""Tasks, metrics, intervals and reports; a model is known by its `EvaluatedModel` methods alone."""

from medmoe_jax.evaluation.items import Item
from medmoe_jax.evaluation.report import Report, Result
from medmoe_jax.evaluation.run import evaluate
from medmoe_jax.evaluation.shots import Fitter, Shots
from medmoe_jax.evaluation.tasks import Task, list_tasks, load_task
from medmoe_jax.evaluation.ways import EvaluatedModel, Way

__all__ = [
    "EvaluatedModel",
    "Fitter",
    "Item",
    "Report",
    "Result",
    "Shots",
    "Task",
    "Way",
    "evaluate",
    "list_tasks",
    "load_task",
]
