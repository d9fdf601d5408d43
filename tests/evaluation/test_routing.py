"""Routing by language: counts against a float64 model with loops, figures by hand, pictures."""

import collections
import json
import math

import jax
import numpy as np
import pytest

from medmoe_jax.adapters.bank import BankSpec, mixing
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base.execution import Execution
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.templates import TEMPLATES
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import routing, routing_report
from medmoe_jax.parallel.mesh import batch_sharding, make_mesh
from medmoe_jax.routing.languages import Languages
from tests import naive, tiny

CONFIG = tiny.DECODER
TABLE = Languages(("west", "east", "south"), {"en": 0, "de": 0, "zh": 1}, {})
FAMILY = BankSpec(
    "family", ("mlp.gate", "mlp.down"), 0, 2, experts=3, rank=2, top_k=2, gate="language",
    renormalise=False, router_bias=False,
)  # fmt: skip
LATE = BankSpec("late", ("attn.q",), 1, 2, experts=2, rank=2, top_k=1, gate="token")
SKILLS = BankSpec("skills", ("attn.o",), 0, 2, experts=3, rank=2, gate="skill")
PLAIN = BankSpec("plain", ("attn.v",), 0, 2, rank=2)
SPECS = (FAMILY, LATE, PLAIN, SKILLS)
MARGIN = 1e-5  # of the logits at the cut, beyond float32's rounding
LENGTH = 40
CODES = ("de", "", "en", "zh", "sw")


@pytest.fixture(scope="module")
def parameters():
    banks = naive.random_banks(SPECS, CONFIG)
    # Its weights are read, its factors add nothing: the loops need not know of it.
    banks["skills"]["attn.o"]["lora_b"] *= 0.0
    banks["skills"]["mix"]["weight"] = np.asarray([[0.5, -1.5, 0.0]], np.float32)
    return naive.random_params(CONFIG), banks


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.tokenizer(), TEMPLATES["user_assistant"], languages=TABLE.ids)


def texts():
    rows = [RowReader()(row) for row in tiny.knowledge_rows()[:8] + tiny.alignment_rows()[:5]]
    return routing.by_language([(r, CODES[n % 5], f"row {n}") for n, r in enumerate(rows)], TABLE)


def measured(parameters, encoder, batch, **sizes):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    execution = Execution(activations=batch_sharding(mesh, 3))
    config = AdaptedConfig(CONFIG, SPECS, execution)
    return routing.measure(config, *parameters, mesh, texts(), encoder, LENGTH, batch, TABLE)


@pytest.fixture(scope="module")
def gates(parameters, encoder):
    return measured(parameters, encoder, 1, fsdp=1)


def counted(parameters, encoder):
    """`{(gate, language): [N, E]}` picks, a token and a row at a time."""
    base, banks = parameters
    routed = [spec.replace(gate="token") for spec in (FAMILY, LATE)]
    model = naive.adapted([*routed, PLAIN], banks, margin=MARGIN)
    counts = collections.defaultdict(lambda: collections.defaultdict(int))
    language = ""

    def linear(layer, site, x_TxD, weight):
        for spec in routed:
            if site in spec.sites and spec.start <= layer < spec.stop:
                router, i = naive.f64(banks[spec.name][site]["router"]), layer - spec.start
                key = (f"{spec.name}/{site}", language)
                for x_D in x_TxD:
                    picks = naive.router_gates(x_D, router, i, spec.top_k, False, MARGIN)
                    for e in np.flatnonzero(picks):
                        counts[key][i, e] += 1
        return model(layer, site, x_TxD, weight)

    for one in texts():
        language = one.name
        for row in one.rows:
            ids = encoder(row).cut(LENGTH).tokens
            batch, _ = naive.pack([ids], [[0]], len(ids))
            naive.logits(CONFIG, base, batch, linear)
            counts["tokens", language][0] += len(ids)
    return counts


def test_counts_are_those_of_loops(gates, parameters, encoder):
    counts = counted(parameters, encoder)
    wanted = ["family/mlp.gate", "family/mlp.down", "late/attn.q", "skills/mix"]
    assert [g.name for g in gates] == wanted
    names = [one.name for one in texts()]
    assert names == ["de", "en", "zh", "sw", "unknown"]
    for gate in gates[:3]:
        wanted = np.zeros_like(gate.use_GxNxE)
        for g, name in enumerate(names):
            for (i, e), number in counts[gate.name, name].items():
                wanted[g, i, e] = number
        assert np.array_equal(gate.use_GxNxE, wanted)
        assert gate.tokens_G.tolist() == [counts["tokens", name][0] for name in names]
    assert (gates[0].first_layer, gates[2].first_layer) == (0, 1)
    assert gates[0].experts == TABLE.experts and gates[2].experts == ("0", "1")
    # The languages differ, or nothing here could fail.
    assert gates[0].divergence_N.min() > 1e-3 and (gates[0].use_GxNxE > 0).any(axis=0).all()


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 2, "sequence": 4}])
def test_those_of_an_answer_are_counted_where_its_tokens_were_drawn(sizes, parameters, encoder):
    """By loops, from the last token of the prompt to the last but one of the answer."""
    base, banks = parameters
    ids = encoder(texts()[0].rows[0]).cut(LENGTH).tokens
    at = len(ids) // 2
    batch, _ = naive.pack([ids], [[0]], len(ids))
    routed = [spec.replace(gate="token") for spec in (FAMILY, LATE)]
    model = naive.adapted([*routed, PLAIN], banks, margin=MARGIN)
    wanted = collections.defaultdict(lambda: np.zeros((2, 3)))

    def linear(layer, site, x_TxD, weight):
        for spec in routed:
            if site in spec.sites and spec.start <= layer < spec.stop:
                router, i = naive.f64(banks[spec.name][site]["router"]), layer - spec.start
                for x_D in x_TxD[at - 1 : -1]:
                    picks = naive.router_gates(x_D, router, i, spec.top_k, False, MARGIN)
                    wanted[f"{spec.name}/{site}"][i, np.flatnonzero(picks)] += 1
        return model(layer, site, x_TxD, weight)

    naive.logits(CONFIG, base, batch, linear)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    config = AdaptedConfig(CONFIG, SPECS, Execution(activations=batch_sharding(mesh, 3)))
    gates = routing.spoke(config, base, banks, mesh, ids[:at], ids[at:], 0, TABLE)
    assert [gate.name for gate in gates[:3]] == sorted(wanted, key=list(wanted).index)
    for gate in gates[:3]:
        layers, experts = gate.use_GxNxE.shape[1:]
        assert np.array_equal(gate.use_GxNxE[0], wanted[gate.name][:layers, :experts])
        assert gate.tokens_G.tolist() == [len(ids) - at]


@pytest.mark.parametrize("sizes", [{"fsdp": 1}, {"fsdp": 8}, {"fsdp": 2, "sequence": 4}])
def test_any_batch_size_and_mesh_gives_the_same_table(sizes, gates, parameters, encoder):
    others = measured(parameters, encoder, 8, **sizes)
    for one, other in zip(gates, others, strict=True):
        assert np.array_equal(one.use_GxNxE, other.use_GxNxE)
        assert np.array_equal(one.tokens_G, other.tokens_G)
        assert naive.rel(other.entropy_GxN, one.entropy_GxN) < 1e-5


def test_own_experts_and_mixing_weights(gates, parameters):
    family, late, skills = gates[0], gates[2], gates[3]
    assert family.own_G.tolist() == [0, 0, 1, -1, -1] and late.own_G.tolist() == [-1] * 5
    want = family.use_GxNxE[2, :, 1] / family.tokens_G[2]
    assert np.allclose(family.own_GxN[2], want) and np.isnan(family.own_GxN[3:]).all()
    assert np.allclose(skills.share_GxNxE, [0.25, 0.75, 0.0])
    weight = parameters[1]["skills"]["mix"]["weight"]
    assert np.array_equal(skills.use_GxNxE[0], np.abs(np.tile(mixing(SKILLS, weight), (2, 1))))
    assert not skills.divergence_N.any()
    assert np.allclose(skills.effective_GxN, np.exp(0.25 * np.log(4) + 0.75 * np.log(4 / 3)))


def test_the_forced_expert_is_counted(parameters, encoder):
    """A gate that always forces: every token of a language with an expert picks it."""
    base, banks = parameters
    mesh = make_mesh(dict.fromkeys(("data", "expert", "tensor"), 1) | {"fsdp": -1}, jax.devices())
    model = AdaptedConfig(CONFIG, (FAMILY.replace(forcing="always"),))
    gate, _ = routing.measure(model, base, banks, mesh, texts(), encoder, LENGTH, 8, TABLE)
    assert (gate.own_GxN[:3] == 1).all() and np.isnan(gate.own_GxN[3:]).all()


def test_groups_keep_the_first_rows_of_each_language():
    codes = ["en" if n % 2 else "zh" for n in range(6)]
    rows = [({"conversations": [n], "language": ""}, c, f"row {n}") for n, c in enumerate(codes)]
    english, chinese = routing.by_language(rows, TABLE, limit=2)
    assert [row["conversations"] for row in english.rows] == [[1], [3]]
    assert {row["language"] for row in chinese.rows} == {"zh"}
    assert english.rows.place(1) == "row 3"
    assert routing.by_language(rows, None)[0].code == "en"


def test_without_a_gate_or_a_row(parameters, encoder):
    base, banks = parameters
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    with pytest.raises(UserError, match=r"no bank .* has a router .*\(banks: plain\)"):
        routing.measure(
            AdaptedConfig(CONFIG, (PLAIN,)), base, banks, mesh, texts(), encoder, LENGTH, 1
        )
    with pytest.raises(UserError, match="no row to analyse"):
        routing.measure(AdaptedConfig(CONFIG, SPECS), base, banks, mesh, [], encoder, LENGTH, 1)


def test_the_report_is_whole(gates, tmp_path):
    written = routing_report.save(tmp_path / "deep", texts(), gates, "Routing")
    figures = json.loads(written["json"].read_text())
    assert figures["languages"]["sw"] == {"rows": 2, "tokens": int(gates[0].tokens_G[3])}
    family = figures["gates"]["family/mlp.gate"]
    assert np.allclose(family["share"]["zh"], gates[0].share_GxNxE[2], atol=1e-6)
    assert family["own"] == {"de": "west", "en": "west", "zh": "east"}
    assert set(family["own_share"]) == {"de", "en", "zh"}
    assert "own" not in figures["gates"]["late/attn.q"]
    page = written["html"].read_text()
    pictures = {name for name in written if name not in ("json", "html")}
    assert {"divergence", "entropy", "own.family.mlp.gate", "share.skills.mix"} <= pictures
    assert page.count("<figure>") == len(pictures) == 2 + 4 * 2 + 2
    for outside in ('href="http', 'src="', "url(http", "@import", "<script"):
        assert outside not in page
    for name in pictures:
        assert written[name].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == sorted(
        path.name for path in written.values()
    )
