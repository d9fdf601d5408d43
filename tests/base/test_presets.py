"""Presets against the published parameter counts of the models."""

import math

import pytest

from medmoe_jax.base import decoder
from medmoe_jax.base.presets import PRESETS, preset
from medmoe_jax.errors import UserError

# Parameter counts that the publishers' safetensors files state (a tied head counted once).
COUNTS = {
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen1.5-14b": 14_167_290_880,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    # The text of these: what the files hold, less 416,866,032 of the vision tower and 1152·(D + 1)
    # of the projector.
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472 - 416_866_032 - 1152 * 2561,
    "gemma3-12b": 12_187_325_040 - 416_866_032 - 1152 * 3841,
    "gemma3-27b": 27_432_406_640 - 416_866_032 - 1152 * 5377,
    "medgemma-4b": 4_300_079_472 - 416_866_032 - 1152 * 2561,
    "medgemma-27b": 27_009_002_240,
    "smollm2-135m": 134_515_008,
    "phi3-mini": 3_821_079_552,
}


@pytest.mark.parametrize("name", sorted({*PRESETS, *COUNTS}))
def test_parameter_count_is_the_published_one(name):
    shapes = decoder.shapes(preset(name))
    assert sum(math.prod(shape) for shape in shapes.values()) == COUNTS[name]


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no preset 'qwen9'.*qwen1\.5-14b.*phi3-mini"):
        preset("qwen9")
