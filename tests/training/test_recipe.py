"""Recipes that do not fit together are refused, naming the field."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from medmoe_jax.adapters.lifecycle import active_banks
from medmoe_jax.base import decoder
from medmoe_jax.errors import UserError
from medmoe_jax.training import recipe as recipe_lib
from medmoe_jax.training import transitions
from medmoe_jax.training.config import (
    allocator,
    bank,
    orthogonality,
    orthonormality,
    recipe,
    sparsity,
    stacked,
    stage,
)
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.stage import chain
from tests import naive, tiny

ONE = {"experts": 1, "rank": 2}


def config_of(**stages):
    """A recipe of these stages in order, on sources `a` and `b`."""
    config = recipe()
    config.data.sources = ConfigDict({"a": {}, "b": {}})
    config.stages.order = tuple(stages)
    for name, fields in stages.items():
        fields = {"mixture": {"a": 1.0}, **fields}
        config.stages[name] = stage(**fields)
    return config


def add(name="x", sites=("mlp.up",), **fields):
    return {name: bank(sites=sites, **fields)}


SCALED = add("x", learned_scale=True)
FIRST = {"banks": add("x") | add("y") | add("routed", gate="token", experts=4)}


def second(**fields):
    return {"first": FIRST, "second": {"after": "first", **fields}}


REFUSED = {
    "order_unknown": (None, "stages.order: there is no stage 'ghost'; defined: first"),
    "after_unknown": ({"s": {"after": "ghost", "banks": add()}}, "stages.s.after: 'ghost' does"),
    "after_itself": ({"s": {"after": "s", "banks": add()}}, "stages.s.after: 's' does not stand"),
    "after_later": (
        {"s": {"after": "t", "banks": add()}, "t": {"banks": add()}},
        "stages.s.after: 't' does not stand before it",
    ),
    "source_unknown": (
        {"s": {"banks": add(), "mixture": {"ghost": 1.0}}},
        "stages.s.mixture: there is no source 'ghost'; data.sources: a, b",
    ),
    "mixture_empty": ({"s": {"banks": add(), "mixture": {}}}, "stages.s.mixture is empty"),
    "mixture_zero": ({"s": {"banks": add(), "mixture": {"a": 0.0}}}, "stages.s.mixture is empty"),
    "no_steps": ({"s": {"banks": add(), "epochs": 0.0}}, "stages.s: give steps or epochs above 0"),
    "merge_routed": (second(merge=("routed",)), "stages.second: bank 'routed' has gate 'token'"),
    "merge_unknown": (
        second(merge=("z",)),
        "stages.second: there is no bank 'z'; known: rou",
    ),
    "merge_twice": (
        {**second(merge=("x",)), "third": {"after": "second", "merge": ("x",)}},
        "stages.third: bank 'x' is merged already",
    ),
    "drop_unknown": (second(drop=("z",)), "stages.second: there is no bank 'z'"),
    "drop_merged": (second(merge=("x",), drop=("x",)), "stages.second: bank 'x' is merged"),
    "state_unknown_bank": (second(states={"z": "off"}), "stages.second: there is no bank 'z'"),
    "state_of_dropped": (
        second(drop=("x",), states={"x": "off"}),
        "stages.second: there is no bank 'x'",
    ),
    "state_unknown": (second(states={"x": "frosen"}), "stages.second.states.x: 'frosen' is none"),
    # Otherwise the bank would be neither in the forward pass nor in the weights.
    "state_merged": (second(states={"x": "merged"}), "stages.second.states.x: 'merged' is none"),
    "loss_unknown": (
        second(losses={"o": orthogonality("x", "z")}),
        "stages.second.losses: bank 'z' takes no part",
    ),
    "loss_off": (
        second(states={"y": "off"}, losses={"o": orthogonality("x", "y")}),
        "stages.second.losses: bank 'y' takes no part",
    ),
    "loss_shares_nothing": (
        second(banks=add("w", sites=("attn.q",)), losses={"o": orthogonality("w", "x")}),
        "stages.second.losses: orthogonality: banks 'w' and 'x' share no site",
    ),
    "loss_reduction": (
        second(losses={"o": orthogonality("x", "y", reduction="max")}),
        "stages.second.losses.o.reduction: 'max' is none of mean, sum",
    ),
    "loss_kind": (
        second(losses={"o": ConfigDict({"kind": "least_squares"})}),
        "stages.second.losses.o.kind: 'least_squares' is none of orthogonality, orthonormality",
    ),
    "allocator_unknown": (
        {"s": {"banks": SCALED, "allocators": {"r": allocator("z", 1)}}},
        "stages.s.allocators.r.bank: this stage trains no bank 'z'",
    ),
    "allocator_frozen": (
        {
            "first": {"banks": SCALED},
            "second": {
                "after": "first",
                "states": {"x": "frozen"},
                "banks": add("y"),
                "allocators": {"r": allocator("x", 1)},
            },
        },
        "stages.second.allocators.r.bank: this stage trains no bank 'x'",
    ),
    "allocator_twice": (
        {"s": {"banks": SCALED, "allocators": {"r": allocator("x", 1), "t": allocator("x", 1)}}},
        "stages.s.allocators.t.bank: 'x' has an allocator already",
    ),
    "allocator_plain": (
        {"s": {"banks": add(), "allocators": {"r": allocator("x", 1)}}},
        "stages.s.allocators.r.bank: 'x' has no Λ; give it low-rank experts with learned_scale",
    ),
    "allocator_below": (
        {"s": {"banks": SCALED, "allocators": {"r": allocator("x", 0)}}},
        "stages.s.allocators.r.target_rank: 0 is below 1",
    ),
    "allocator_above": (
        {"s": {"banks": SCALED, "allocators": {"r": allocator("x", 17)}}},
        "stages.s.allocators.r.target_rank: 17 is above the rank 16 that bank 'x' starts with",
    ),
    "allocator_too_long": (
        {
            "s": {
                "banks": SCALED,
                "allocators": {"r": allocator("x", 1, t_init=3, t_final=2)},
                "steps": 5,
            }
        },
        "stages.s.allocators.r.t_init: 3 + t_final 2 leave none of the run's 5 steps",
    ),
    "trains_nothing": (
        second(states={"x": "frozen", "y": "frozen", "routed": "off"}),
        "stages.second trains nothing",
    ),
    "bank_twice": (second(banks=add("x")), "stages.second: bank 'x' is there already"),
    "sites": ({"s": {"banks": add(sites=("mpl.*",))}}, "bank 'x'.sites: pattern 'mpl.*' matches"),
    "no_sites": ({"s": {"banks": add(sites=())}}, "bank 'x'.sites is empty"),
    "layers": ({"s": {"banks": add(layers=(3, 3))}}, "bank 'x'.layers: (3, 3) holds none of"),
    "layers_beyond": ({"s": {"banks": add(layers=(3, None))}}, "bank 'x'.layers: (3, None) holds"),
    **{
        f"layers {layers}": (
            {"s": {"banks": add(layers=layers)}},
            f"bank 'x'.layers: {layers!r} is no pair",
        )
        for layers in ((-2,), (0, 2, 2), (0, 1, 2, 3), (), ("0", "2"), (0.0, 2.0), (True, None))
    },
    "balance_without_router": (
        {"s": {"banks": add(balance_loss=0.1)}},
        "bank 'x': router_noise, balance_loss and z_loss need a router",
    ),
    "noise_without_router": (
        {"s": {"banks": add(router_noise=0.1)}},
        "bank 'x': router_noise, balance_loss and z_loss need a router",
    ),
    "bank_name": ({"s": {"banks": add("x/y")}}, "stages.s.banks: 'x/y' is no name of a bank"),
    "stack_name": (
        second(stack={"x/y": stacked(("x", "y"))}),
        "second.stack: 'x/y' is no name of a bank",
    ),
    "stack_twice": (
        second(stack={"z": stacked(("x", "x"))}),
        "stack 'z': bank 'x' stands there twice",
    ),
    "stack_of_merged": (
        second(merge=("x",), stack={"z": stacked(("x", "y"))}),
        "stack 'z': bank 'x' is merged into the base already",
    ),
    "orthogonal_to_itself": (
        second(losses={"o": orthogonality("x", "x")}),
        "o.against: 'x' cannot be orthogonal to its",
    ),
    "negative_weight": (
        second(losses={"o": orthogonality("x", "y", weight=-1.0)}),
        "losses.o.weight: -1.0 is below",
    ),
    "negative_orthonormality": (
        second(losses={"o": orthonormality("x", weight=-0.5)}),
        "stages.second.losses.o.weight: -0.5 is below 0",
    ),
    "negative_sparsity": (
        second(losses={"o": sparsity("z", weight=-0.5)}, stack={"z": stacked(("x", "y"))}),
        "stages.second.losses.o.weight: -0.5 is below 0",
    ),
    "moves_nothing": (
        second(states={"x": "frozen"}, losses={"o": orthogonality("x", "y")}),
        "second.losses: orthogonality/x-y would change nothing: this stage does not train x",
    ),
    "keeps_nothing": (
        second(states={"x": "frozen"}, losses={"o": orthonormality("x")}),
        "second.losses: orthonormality/x would change nothing: this stage does not train x",
    ),
    "keeps_what_a_gate_does_not_hold": (
        second(
            losses={"o": orthonormality("z")},
            stack={"z": stacked(("x", "y"))},
            states={"z": "gate"},
        ),
        "second.losses: orthonormality/z would change nothing: this stage does not train z's",
    ),
    "orthogonal_in_a_gate": (
        second(
            losses={"o": orthogonality("z", "routed")},
            stack={"z": stacked(("x", "y"))},
            states={"z": "gate", "routed": "frozen"},
        ),
        "second.losses: orthogonality/z-routed would change nothing: this stage does not train z's",
    ),
    "whole_networks": (
        {
            "s": {
                "banks": add("n", ("mlp.*",), form="ffn_beside", gate="token", experts=4)
                | add("q"),
                "losses": {"o": orthogonality("q", "n")},
            }
        },
        "bank 'n' has whole networks, no factors",
    ),
    "gate": ({"s": {"banks": add(gate="best")}}, "bank 'x'.gate: 'best' is none of"),
    "top_k": ({"s": {"banks": add(gate="token", top_k=2)}}, "bank 'x'.top_k: 2 of 1 experts"),
    "train_base": ({"s": {"train_base": ("embeds",)}}, "stages.s.train_base: 'embeds' matches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parse_refuses(name):
    stages, message = REFUSED[name]
    config = config_of(**(stages or {"first": FIRST}))
    if stages is None:
        config.stages.order = ("first", "ghost")
    with pytest.raises(UserError) as caught:
        recipe_lib.parse(config, naive.TINY)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def refused_to_train(name, **stages):
    """What is against training a stage of a recipe that can be opened; "" if nothing is."""
    roster = {}
    for one in recipe_lib.parse(config_of(**stages), naive.TINY):
        roster = transitions.next_roster(one, roster)
        if one.name == name:
            try:
                recipe_lib.check_learns(one, roster)
            except UserError as error:
                return str(error)
    return ""


def test_a_gate_that_would_never_learn_is_not_trained():
    mixed, one_pick = {"gate": "skill"}, {"gate": "token", "top_k": 1}
    said = refused_to_train("s", s={"banks": add("x", experts=2, **mixed)})
    assert said.startswith("stages.s: bank 'x'.mix_softmax: mixing weights begin with zero")
    stack = {"stack": {"z": stacked(("x", "y"), **mixed)}}
    assert not refused_to_train("second", **second(**stack))
    said = refused_to_train("second", **second(stack={"z": stacked(("x", "y"), **one_pick)}))
    assert said.startswith("stages.second: bank 'z'.top_k: the weight of the only pick")
    first = {"banks": add("z", experts=2, **one_pick)}
    for state, fits in (("frozen", True), ("off", True), ("gate", False), ("train", False)):
        later = {"after": "first", "banks": add("w"), "states": {"z": state}}
        assert (not refused_to_train("second", first=first, second=later)) == fits


def test_a_loss_may_move_either_bank_or_only_be_measured():
    frozen = {"x": "frozen"}
    for loss in (
        orthogonality("x", "y", stop_gradient=False), orthogonality("y", "x"),
        orthogonality("x", "y", weight=0.0),
    ):  # fmt: skip
        recipe_lib.parse(config_of(**second(states=frozen, losses={"o": loss})), naive.TINY)


def test_what_is_merged_into_codes_stays_in_the_forward_pass():
    """So banks that cannot stand beside it are refused before anything is trained."""
    whole = add("n", ("mlp.*",), form="ffn", gate="token", experts=4)
    config = config_of(first={"banks": add("x")}, second={
        "after": "first", "merge": ("x",), "banks": whole,
    })  # fmt: skip
    recipe_lib.parse(config, naive.TINY)
    config.base.quantise = "int8"
    with pytest.raises(UserError, match="'n' puts feed-forward experts into layers where bank 'x'"):
        recipe_lib.parse(config, naive.TINY)


def test_a_stage_stands_in_the_order_once():
    config = config_of(first=FIRST)
    config.stages.order = ("first", "first")
    with pytest.raises(UserError, match=r"stages\.order: 'first' stands there twice"):
        recipe_lib.parse(config, naive.TINY)


@pytest.mark.parametrize(
    "make", [stage, bank, lambda **f: orthogonality("a", "b", **f)], ids=["stage", "bank", "loss"]
)
def test_sections_refuse_unknown_fields(make):
    with pytest.raises(ValueError, match="no field rnak; known: "):
        make(rnak=3)


def test_medcare_parses():
    first, second = recipe_lib.parse(tiny.medcare_config(), tiny.DECODER)
    roster = transitions.next_roster(first, {})
    assert {name: state for name, (_, state) in roster.items()} == {
        "attention": "train",
        "noise": "train",
        "knowledge": "train",
    }
    roster = transitions.next_roster(second, roster)
    assert {name: state for name, (_, state) in roster.items()} == {
        "attention": "merged",
        "knowledge": "frozen",
        "alignment": "train",
    }
    assert [spec.name for spec in active_banks(roster)] == ["knowledge", "alignment"]
    assert chain((first, second), "align") == (first, second)
    assert chain((first, second), "") == ()


def test_branches_start_from_the_same_stage():
    stages = {**second(drop=("x",)), "third": {"after": "first", "merge": ("x",)}}
    parsed = recipe_lib.parse(config_of(**stages), naive.TINY)
    assert [s.name for s in chain(parsed, "third")] == ["first", "third"]


def test_start_and_replay_follow_the_algebra():
    """A replayed model computes what the banks, taken one by one, compute; `off` is absent."""
    stages = {
        "first": {"banks": add("a", ("attn.*",), rank=2) | add("b", rank=2) | add("c", rank=2)},
        "second": {
            "after": "first",
            "merge": ("a",),
            "drop": ("c",),
            "states": {"b": "off"},
            "banks": add("d", ("mlp.down",), rank=3),
            "train_base": ("final_norm",),
        },
    }
    parsed = recipe_lib.parse(config_of(**stages), naive.TINY)
    specs = {spec.name: spec for s in parsed for spec in s.added}
    banks = naive.random_banks(specs.values(), naive.TINY)
    norm = 1.0 + np.arange(naive.TINY.d_model, dtype=np.float32) / 10
    finals = {
        "first": {"banks": {k: banks[k] for k in "abc"}},
        "second": {"banks": {k: banks[k] for k in "abd"}, "base": {"final_norm": norm}},
    }
    original = naive.random_params(naive.TINY)
    roster, got, base, leaves = transitions.replay(
        parsed, "second", jax.tree.map(np.array, original), naive.TINY, finals.get
    )
    assert {k: state for k, (_, state) in roster.items()} == {
        "a": "merged",
        "b": "off",
        "d": "train",
    }
    assert set(got) == set("abd")
    batch = naive.random_batch(naive.TINY, rows=((5, 4),), length=9)
    reference = dict(original, final_norm=norm)

    def twin(names):
        chosen = [specs[n] for n in names]
        return naive.logits(naive.TINY, reference, batch, naive.adapted(chosen, banks))

    want = twin("ad")
    active = active_banks(roster)
    assert [spec.name for spec in active] == ["d"]
    assert set(leaves) == {"final_norm"} and "final_norm" not in base
    base = {**base, **leaves}
    have = naive.logits(naive.TINY, base, batch, naive.adapted(active, got))
    assert naive.rel(have, want) < 1e-5
    for names in ("a", "d", "abd", "acd"):
        assert np.abs(twin(names) - want).max() > 0.1
    assert transitions.replay(parsed, "", original, naive.TINY, finals.get) == (
        {},
        {},
        original,
        {},
    )


def test_new_banks_start_without_effect_and_by_seed():
    parsed = recipe_lib.parse(config_of(first=FIRST), naive.TINY)
    base = naive.random_params(naive.TINY)
    _, banks, same = transitions.start(parsed[0], {}, {}, base, naive.TINY)
    _, again, _ = transitions.start(parsed[0], {}, {}, base, naive.TINY)
    assert same is base
    jax.tree.map(np.testing.assert_array_equal, banks, again)
    assert not any(np.any(site["lora_b"]) for b in banks.values() for site in b.values())
    assert not np.array_equal(banks["x"]["mlp.up"]["lora_a"], banks["y"]["mlp.up"]["lora_a"])
    other = recipe_lib.parse(config_of(first={**FIRST, "seed": 1}), naive.TINY)
    _, moved, _ = transitions.start(other[0], {}, {}, base, naive.TINY)
    assert not np.array_equal(banks["x"]["mlp.up"]["lora_a"], moved["x"]["mlp.up"]["lora_a"])


def test_finish_keeps_the_dtype_of_the_base():
    base = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), naive.random_params(naive.TINY))
    final = {"base": {"final_norm": np.full(naive.TINY.d_model, 1.001, np.float32)}}
    banks, rest, after = transitions.ended(final, base)
    assert banks == {} and after["final_norm"].dtype == jax.numpy.bfloat16
    assert float(after["final_norm"][0]) == 1.0
    assert set(after) == {"final_norm"} and set(rest) == set(base) - set(after)
    assert rest["embed"] is base["embed"]


SETUP_REFUSED = {
    "dtype": ("base.dtype", "float16", "base.dtype: 'float16' is none of float32, bfloat16"),
    "length": ("data.length", 129, "data.length: 129 exceeds the base's context of 128"),
    "mask": ("data.mask", "all", "data.mask: 'all' is none of completion, answer"),
    "template": ("data.template", "chatlm", "unknown template 'chatlm'"),
    "tokenizer": ("base.tokenizer", "nothing.model", "nothing.model: no such tokenizer file"),
    "path": ("base.path", "nothing", "base.path: 'nothing' is neither a directory"),
    "both": ("base.preset", "qwen2-0.5b", "base: give either base.path"),
    "mesh": ("run.mesh.data", 3, "run.mesh: {'data': 3"),
    "remat": ("run.remat", "some", "run.remat: 'some' is none of"),
    "attention": ("run.attention", "flash", "run.attention: 'flash' is none of"),
    "kernels": ("run.kernels", "cuda", "run.kernels: 'cuda' is none of"),
    "no_tpu": ("run.kernels", "pallas", "run.kernels: 'pallas' needs TPUs, these devices are cpu"),
    "dispatch": ("run.dispatch", "fastest", "run.dispatch: 'fastest' is none of"),
    "log_every": ("run.log_every", 0, "run.log_every: 0 is below 1"),
    "save_every": ("run.save_every", 0, "run.save_every: 0 is below 1"),
    "keep": ("run.keep", 0, "run.keep: 0 is below 1"),
    "accumulation": ("run.accumulation", 0, "run.accumulation: 0 is below 1"),
    "score_batch": ("run.score_batch", -1, "run.score_batch: -1 is below 1"),
}


@pytest.mark.parametrize("name", SETUP_REFUSED)
def test_open_setup_refuses(name):
    field, value, message = SETUP_REFUSED[name]
    config = tiny.medcare_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as caught:
        open_setup(config)
    assert message in str(caught.value)


def test_random_bases():
    config = tiny.medcare_config()
    fields = {"vocab_size": 304, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
    config.base.path, config.base.decoder = "", ConfigDict({**fields, "head_dim": 8, "d_ff": 24})
    config.run.mesh.tensor = 2
    setup = open_setup(config)
    assert setup.base.config.vocab_used == tiny.tokenizer().vocab_size == 300
    base = setup.load_base()
    want = decoder.init(setup.base.config, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), base, want)
    assert "tensor" in str(base["layers"]["mlp"]["up"]["kernel"].sharding.spec)
    config.base.decoder.d_modle = 3
    with pytest.raises(UserError, match=r"base\.decoder: no field d_modle; known: vocab_size"):
        open_setup(config)
    config.base.decoder = ConfigDict({"vocab_size": 304})
    with pytest.raises(UserError, match=r"base\.decoder: .*missing.*d_model"):
        open_setup(config)
    config.base.decoder, config.base.preset = ConfigDict(), "qwen9"
    with pytest.raises(UserError, match="qwen9"):
        open_setup(config)


def test_a_vocabulary_that_does_not_fit():
    config = tiny.medcare_config()
    config.base.path, config.base.decoder = (
        "",
        ConfigDict(
            {"vocab_size": 299, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
            | {"head_dim": 8, "d_ff": 24}
        ),
    )
    with pytest.raises(UserError, match="300 ids but the model's vocabulary has 299"):
        open_setup(config)
