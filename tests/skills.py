"""SA-MDKIF's recipe with three skills on the tiny base, and runs of it made once."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from configs import sa_mdkif
from medmoe_jax.training.config import source
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import tiny
from tests.randomised import randomise

TASKS = ("one", "two")


def table() -> dict:
    """Three skills, one of them with two sources."""
    knowledge, alignment = (str(tiny.data(name)) for name in ("knowledge", "alignment"))
    return {
        "facts": ((knowledge,), "Tell me. {text}"),
        "verdict": ((alignment,), "{text}"),
        "both": ((alignment, knowledge), "{text} Say it."),
    }


def config(gate="global", tasks=TASKS) -> ConfigDict:
    """The skills, and a stage for each task that mixes them."""
    config = tiny.medcare_config()
    config.run.mesh.update({"data": -1, "fsdp": 1})  # what compiles soonest
    del config.stages["aggregate"], config.stages["align"]
    config.stages.order = ()
    sa_mdkif.add_skills(config, table())
    for skill in table():
        stage = config.stages[skill]
        stage.steps, stage.learning_rate = 6, 3e-2
        stage.banks[skill].update({"rank": 3, "alpha": 6.0, "sites": ("attn.o", "mlp.*")})
        stage.allocators.ranks.update({"target_rank": 2, "t_init": 1, "t_final": 2, "every": 1})
    for task in tasks:
        config.data.sources[task] = source(str(tiny.data("alignment")))
        config.stages[task] = sa_mdkif.route(
            tuple(table()), sa_mdkif.GATES[gate], mixture={task: 1.0}
        )
        config.stages[task].steps, config.stages[task].learning_rate = 6, 0.1
        config.stages.order = (*config.stages.order, task)
    return config


@functools.cache
def trained() -> Path:
    """A work directory in which the skills are finished and no task is."""
    setup = open_setup(config(tasks=()))
    return tiny.once(tiny.folder() / "skills", lambda workdir: train(Run(setup, workdir)))


@functools.cache
def randomised() -> Path:
    """The same with skills so large that every one of them matters."""
    run = functools.partial(randomise, trained(), size=0.5)
    return tiny.once(tiny.folder() / "random-skills", run)
