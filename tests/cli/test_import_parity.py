"""Released directories beside a naive torch model of the published equations.

The torch side is a transformers Qwen2 whose linear layers are replaced by the equations, one expert
at a time; what it saves is imported, what it loads was exported, and the logits of both are
compared.
"""

import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import apollo_moe, medcare, ming_moe
from medmoe_jax.adapters import model as adapted
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.lifecycle import active_banks, set_state
from medmoe_jax.base import decoder
from medmoe_jax.base.loss import logits
from medmoe_jax.cli.export import FORMATS
from medmoe_jax.training.imports import import_stage
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.trained import open_trained
from tests import naive, tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file

TOLERANCE = 2e-4  # max|a - b| / max|b|, float32; seen: below 1e-5
VISIBLE = 0.1
R, ALPHA, E, K = 3, 6, 5, 2
IDS = np.random.default_rng(4).integers(0, 300, (8, 13))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def linear(d_in, d_out, bias=False):
    layer = torch.nn.Linear(d_in, d_out, bias=bias)
    torch.nn.init.normal_(layer.weight, std=d_in**-0.5)
    return layer


class Pair(torch.nn.Module):
    """`B A x`, in the names `lora_A` and `lora_B` with an ending."""

    def __init__(self, d_in, d_out, rank, end=""):
        super().__init__()
        self.names = f"lora_A{end}", f"lora_B{end}"
        self.add_module(self.names[0], linear(d_in, rank))
        self.add_module(self.names[1], linear(rank, d_out))

    def forward(self, x):
        return getattr(self, self.names[1])(getattr(self, self.names[0])(x))


class Routed(torch.nn.Module):
    """`W x + s Σ_j w_j B_j A_j x (+ s B_K A_K x)`, w the softmax over the K kept logits."""

    def __init__(self, base, s, share, rank=R, experts=E, top_k=K):
        super().__init__()
        self.weight, self.s, d_in, d_out = base.weight, s, base.in_features, base.out_features
        self.top_k = top_k
        self.experts = torch.nn.ModuleList(
            [Pair(d_in, d_out, rank, f"_{e}") for e in range(experts)]
        )
        self.switch = linear(d_in, experts, bias=True)
        torch.nn.init.normal_(self.switch.bias)
        self.share_experts = Pair(d_in, d_out, 2 * rank) if share else None

    def forward(self, x):
        y = x @ self.weight.T
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(y).reshape(-1, y.shape[-1])
        z = flat @ self.switch.weight.T + self.switch.bias
        for t in range(len(flat)):
            kept, which = z[t].topk(self.top_k)
            for w, e in zip(kept.softmax(0), which.tolist(), strict=True):
                out[t] += w * self.experts[e](flat[t])
        y = y + self.s * out.reshape(y.shape)
        return y + self.s * self.share_experts(x) if self.share_experts else y


class Two(torch.nn.Module):
    """`W x + s B_K A_K x + s B_O A_O x`."""

    def __init__(self, routed):
        super().__init__()
        self.weight, self.s, self.base = routed.weight, routed.s, routed.share_experts
        self.orth = Pair(self.weight.shape[1], self.weight.shape[0], 2 * R)

    def forward(self, x):
        return x @ self.weight.T + self.s * (self.base(x) + self.orth(x))


class Mixture(torch.nn.Module):
    """`Σ_j p_j FFN_{I_j}(x)`, p the softmax over all experts, over its K largest made 1 or not."""

    def __init__(self, network, experts, renormalise):
        super().__init__()
        self.experts = torch.nn.ModuleList([copy.deepcopy(network) for _ in range(experts)])
        self.gate = linear(network.gate_proj.in_features, experts)
        self.renormalise = renormalise
        for p in self.experts.parameters():
            torch.nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        probability = (flat @ self.gate.weight.T).float().softmax(-1)
        for t in range(len(flat)):
            kept, which = probability[t].topk(K)
            kept = kept / kept.sum() if self.renormalise else kept
            for w, e in zip(kept, which.tolist(), strict=True):
                out[t] += w * self.experts[e](flat[t])
        return out.reshape(x.shape)


@functools.cache
def base():
    """A random Qwen2 on disk, and the model."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=304, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    config = transformers.Qwen2Config(
        **sizes, **heads, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    folder = tiny.folder() / "parity-base"
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def want(model, ids=IDS):
    return model(torch.tensor(ids)).logits.numpy()


@torch.no_grad()
def first_stage(folder, share, alpha=ALPHA):
    """A trained first stage, saved; the attention's LoRA is PEFT's own."""
    torch.manual_seed(1)
    model = copy.deepcopy(base()[1])
    for layer in model.model.layers:
        for name in MLP:
            setattr(layer.mlp, name, Routed(getattr(layer.mlp, name), alpha / R, share))
    options = dict(r=R, lora_alpha=alpha, target_modules=list(ATTENTION), lora_dropout=0.05)
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    for name, p in model.named_parameters():
        if "self_attn" in name and "lora_" in name:
            torch.nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5)
    everything = model.state_dict()
    model.save_pretrained(folder, state_dict={k: p for k, p in everything.items() if "attn" in k})
    names = (".experts.", ".switch.", ".share_experts.")
    rest = {k: p for k, p in everything.items() if any(name in k for name in names)}
    torch.save(rest, folder / "non_lora_trainables.bin")
    model.config.num_experts_per_token = K
    model.config.save_pretrained(folder)
    return model


@torch.no_grad()
def second_stage(folder, first):
    """The attention merged, the experts dropped, a second block beside the shared one."""
    torch.manual_seed(2)
    model = first.merge_and_unload()
    for layer in model.model.layers:
        for name in MLP:
            setattr(layer.mlp, name, Two(getattr(layer.mlp, name)))
    folder.mkdir()
    blocks = {k: v for k, v in model.state_dict().items() if ".base." in k or ".orth." in k}
    peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(ATTENTION)).save_pretrained(folder)
    save_file(blocks, folder / "model.safetensors")
    return model.eval()


@torch.no_grad()
def upcycled(folder, experts, renormalise):
    """A whole model, all of it trained, whose last two layers are mixtures; saved in shards."""
    torch.manual_seed(3)
    model = copy.deepcopy(base()[1])
    for p in model.parameters():
        p.mul_(1 + 0.3 * torch.randn_like(p))
    for layer in model.model.layers[1:]:
        layer.mlp = Mixture(layer.mlp, experts, renormalise)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "upcycling-qwen2-moe", "num_experts": experts, "mlp_only_layers": [0]}
    config |= {"num_experts_per_tok": K, "norm_topk_prob": renormalise}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def recipe(stages):
    """The tiny recipe on the torch base with these stages, at the ranks of the torch side."""
    config = tiny.medcare_config()
    config.base.path, config.stages = str(base()[0]), stages
    for name in stages.order:
        for key, bank in stages[name].banks.items():
            wide = 2 if key in ("knowledge", "alignment") else 1
            bank.rank, bank.alpha = wide * R, float(wide * ALPHA)
            bank.experts = E if bank.experts > 1 else 1
    return open_setup(config)


def stages(**sections):
    config = tiny.medcare_config().stages
    for name in config.order:
        del config[name]
    config.update(sections)
    config.order = tuple(sections)
    return config


def got(setup, trained, off=""):
    roster = set_state(trained.roster, off, "off") if off else trained.roster
    config = setup.model(active_banks(roster))
    segments, positions = np.ones_like(IDS), np.tile(np.arange(IDS.shape[1]), (len(IDS), 1))

    @jax.jit
    def forward(params, banks, *batch):
        x, *_ = adapted.hidden(config, params, banks, *batch)
        return logits(config.decoder, decoder.head(params), x)

    batch = (jnp.asarray(x, jnp.int32) for x in (IDS, segments, positions))
    return np.asarray(forward(trained.whole, trained.banks, *batch))[..., :300]


def compare(setup, workdir, stage, want):
    """Equal logits, and no bank to spare."""
    trained, want = open_trained(Run(setup, workdir), stage), want[..., :300]
    error = naive.rel(got(setup, trained), want)
    print(f"logits of {stage}: error {error:.1e}")
    assert error < TOLERANCE
    bare = open_trained(Run(setup, workdir), "")
    assert naive.rel(got(setup, bare), want) > VISIBLE
    if any(state == "merged" for _, state in trained.roster.values()):
        unmerged = dataclasses.replace(trained, base=bare.base)
        assert naive.rel(got(setup, unmerged), want) > VISIBLE
    for spec in active_banks(trained.roster):
        assert naive.rel(got(setup, trained, spec.name), want) > VISIBLE, spec.name


@pytest.mark.parametrize("alpha", [ALPHA, 7])
def test_routed_experts(tmp_path, alpha):
    """With another alpha than the recipe's, too: the difference is inside B."""
    model = first_stage(tmp_path / "a", share=False, alpha=alpha)
    setup = recipe(stages(mixture=ming_moe.routed_experts(mixture={"knowledge": 1.0})))
    assert import_stage(Run(setup, tmp_path / "w"), tmp_path / "a") == "mixture"
    compare(setup, tmp_path / "w", "mixture", want(model))


@torch.no_grad()
def loaded(folder):
    """The model that the authors' code makes of a directory: PEFT's part merged, experts around."""
    config, options = (
        json.loads((folder / name).read_text()) for name in ("config.json", "adapter_config.json")
    )
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base()[1]), folder).merge_and_unload()
    rank, sizes = options["r"], (config["num_experts"], config["num_experts_per_token"])
    for layer in model.model.layers:
        for name in MLP:
            routed = Routed(getattr(layer.mlp, name), options["lora_alpha"] / rank, 0, rank, *sizes)
            setattr(layer.mlp, name, routed)
    stored = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    stored = {
        key.removeprefix("base_model.").removeprefix("model."): x for key, x in stored.items()
    }
    absent, surplus = model.load_state_dict(stored, strict=False)
    assert not surplus and not [key for key in absent if "experts" in key or "switch" in key]
    return model.eval()


FFN = ("mlp.gate", "mlp.up", "mlp.down")
EXPORTED = {
    "as published": (
        BankSpec("attention", ("attn.q", "attn.k", "attn.v", "attn.o"), 0, 3, rank=R, alpha=6.0),
        BankSpec("experts", FFN, 0, 3, experts=E, rank=R, alpha=6.0, gate="token"),
    ),
    "some layers and projections, Λ, no bias, a bank beside them": (
        BankSpec("knowledge", FFN, 1, 3, rank=4, alpha=3.0),
        BankSpec(
            *("experts", ("mlp.up", "mlp.down"), 1, 2), experts=3, rank=2, rank_stabilised=True,
            gate="token", top_k=1, router_bias=False, learned_scale=True,
        ),
    ),
    "nothing beside them": (BankSpec("experts", FFN, 0, 3, experts=2, rank=2, gate="token"),),
}  # fmt: skip


@pytest.mark.parametrize("specs", EXPORTED.values(), ids=EXPORTED)
def test_exported_experts(tmp_path, specs):
    """As the banks in float64; with an expert that is never picked the logits are others."""
    setup = recipe(stages(mixture=ming_moe.routed_experts(mixture={"knowledge": 1.0})))
    trained = dataclasses.replace(
        open_trained(Run(setup, tmp_path / "w"), ""),
        roster={spec.name: (spec, "frozen") for spec in specs},
        banks=naive.random_banks(specs, setup.base.config, size=2.0),
    )
    FORMATS["ming"].write(setup, trained, str(tmp_path / "out"), None, {})
    model = loaded(tmp_path / "out").double()
    ids = IDS[:1]
    batch = {
        "tokens": ids, "segment_ids": np.ones_like(ids), "positions": np.arange(ids.size)[None]
    }  # fmt: skip

    def ours(chosen):
        linear = naive.adapted(chosen, trained.banks, margin=0.0)
        return naive.logits(setup.base.config, trained.base, batch, linear)[..., :300]

    theirs = want(model, ids)[..., :300]
    assert naive.rel(ours(specs), theirs) < 1e-6
    for spec in specs:
        others = tuple(one for one in specs if one != spec)
        assert naive.rel(ours(others), theirs) > VISIBLE, spec.name
    (spec,) = (spec for spec in specs if spec.routed)
    for e in range(spec.experts):
        changed = copy.deepcopy(model)
        for layer in changed.model.layers:
            for name in MLP:
                getattr(layer.mlp, name).switch.bias.data[e] -= 1e4
        assert naive.rel(want(changed, ids)[..., :300], theirs) > 0.01, f"expert {e}"


def test_two_stages(tmp_path):
    first = first_stage(tmp_path / "one", share=True)
    mixture = {"mixture": {"knowledge": 1.0}}
    sections = {"aggregate": medcare.aggregate(**mixture), "align": medcare.align(**mixture)}
    setup = recipe(stages(**sections))
    import_stage(Run(setup, tmp_path / "w"), tmp_path / "one")
    compare(setup, tmp_path / "w", "aggregate", want(first))
    second = second_stage(tmp_path / "two", first)
    import_stage(Run(setup, tmp_path / "w"), tmp_path / "two", "align")
    compare(setup, tmp_path / "w", "align", want(second))


@pytest.mark.parametrize("renormalise", [False, True])
def test_upcycled_experts(tmp_path, renormalise):
    """No expert, and no router, to spare either."""
    config = tiny.medcare_config()
    config.base.path, config.data.languages = str(base()[0]), "families"
    section = apollo_moe.language_experts(7, (-2, None), "ffn", mixture={"knowledge": 1.0})
    section.banks.experts.renormalise = renormalise
    config.stages = stages(mixture=section)
    setup, workdir = open_setup(config), tmp_path / "w"
    model = upcycled(tmp_path / "a", 7, renormalise)
    assert import_stage(Run(setup, workdir), tmp_path / "a") == "mixture"
    wanted = want(model)
    compare(setup, workdir, "mixture", wanted)
    trained = open_trained(Run(setup, workdir), "mixture")
    bank = trained.banks["experts"]
    lacking = [
        {"mlp.down": {"experts": bank["mlp.down"]["experts"].at[:, e].set(0)}} for e in range(7)
    ]
    lacking.append({"mlp": jax.tree.map(jnp.zeros_like, bank["mlp"])})
    for change in lacking:
        changed = dataclasses.replace(trained, banks={"experts": bank | change})
        assert naive.rel(got(setup, changed), wanted[..., :300]) > VISIBLE
