"""Where a method that lost a trial may win: its arms again, with one thing changed at a time.

Short runs, so that two cores do them: STEPS of four rows of 128 tokens, at the learning rates that
the trials have chosen. In the setting `first` nothing else is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import trial_families, trial_medcare, trial_mixture

STEPS = 30
FEW = 8  # rows of a set where few are read
HELD = 12  # most held-out rows of a set


class Setting(NamedTuple):
    """What is changed.

    Attributes:
      banks: by arm, values of its banks' fields, `BANK.FIELD`.
      few: whether `FEW` rows of each set are read.
    """

    banks: Mapping[str, Mapping[str, Any]] = {}
    few: bool = False


class Settings(NamedTuple):
    """A recipe with some arms of a trial's, in every setting.

    Attributes:
      recipe: of the trial, by the argument of its config.
      rates: its arms, and by what their learning rate is multiplied, as the trial has chosen.
      settings: by name.
    """

    recipe: Callable[[str], ConfigDict]
    rates: Mapping[str, float]
    settings: Mapping[str, Setting]

    @property
    def arms(self) -> tuple[str, ...]:
        """ARM_SETTING, all of a setting one after the other."""
        return tuple(f"{arm}_{name}" for name in self.settings for arm in self.rates)

    def get_config(self, arg: str) -> ConfigDict:
        """The recipe; `arg` as that of the trial's config."""
        config = self.recipe(arg)
        config.base.dtype = "float32"  # on a CPU a third faster than bfloat16
        config.data.length = 128
        config.data.global_batch = config.data.shards = 4
        for name in list(config.data.sources):
            few = copy.deepcopy(config.data.sources[name])
            few.path = few.path.replace(f"{name}.jsonl", f"{name}_few.jsonl")
            config.data.sources[f"{name}_few"] = few
        for name, setting in self.settings.items():
            for arm, factor in self.rates.items():
                stage = copy.deepcopy(config.stages[arm])
                stage.steps = STEPS
                stage.learning_rate *= factor
                if setting.few:
                    stage.mixture = {f"{one}_few": weight for one, weight in stage.mixture.items()}
                for field, value in setting.banks.get(arm, {}).items():
                    bank, _, field = field.partition(".")
                    stage.banks[bank][field] = value
                config.stages[f"{arm}_{name}"] = stage
        config.stages.order = self.arms
        return config


def ranked(bank: str, rank: int, **fields) -> dict[str, Any]:
    """A bank of another rank, scaled by two as before."""
    changed = {"rank": rank, "alpha": 2.0 * rank, **fields}
    return {f"{bank}.{field}": value for field, value in changed.items()}


# The ranks of a LoRA make up for the parameters of the router as well.
NOISE = Settings(
    trial_medcare.get_config,
    {"aggregate": 1.0},
    {
        "first": Setting(),
        "few": Setting(few=True),
        "narrow": Setting({"aggregate": ranked("noise", 2)}),
        "many": Setting({"aggregate": ranked("noise", 4, experts=32)}),
        "wide_knowledge": Setting({"aggregate": ranked("knowledge", 128)}),
    },
)
EXPERTS = Settings(
    trial_mixture.get_config,
    {"experts": 3.0, "lora": 1.0},
    {
        "first": Setting(),
        "few": Setting(few=True),
        "narrow": Setting({"experts": ranked("experts", 2), "lora": ranked("lora", 18)}),
        "many": Setting({"experts": ranked("experts", 4, experts=32), "lora": ranked("lora", 94)}),
    },
)
FAMILIES = Settings(
    trial_families.get_config,
    {"last": 1.0, "dense_last": 1.0},
    {
        "first": Setting(),
        "last_6": Setting(
            {"last": {"experts.layers": (-6, None)}, "dense_last": {"lora.layers": (-6, None)}}
        ),
    },
)
