"""A bare base: no bank, no stage. For scoring, evaluating and generating with it.

  medmoe score --config=configs/base_only.py --config.base.path=DIR --input=IN --output=OUT
  medmoe generate --config=configs/base_only.py --config.base.path=DIR "Hello"

Hardware: whatever holds the base.
"""

from ml_collections import ConfigDict

from medmoe_jax.training.config import recipe


def get_config() -> ConfigDict:
    """A recipe with no stage; set `base.path`, and `data.template` to what the base was taught."""
    config = recipe()
    config.data.template = "plain"
    config.data.length = 0
    return config
