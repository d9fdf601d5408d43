"""AdaLoRA against PEFT's: forward, regulariser, and every step of a whole schedule.

Axes: N layers of the bank, D input width, E experts, r rank, O output width.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medmoe_jax.adapters import adalora, model
from medmoe_jax.adapters.adalora import Allocator, BudgetSchedule
from medmoe_jax.adapters.bank import BankSpec
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.adapters.orthonormality import Orthonormality
from medmoe_jax.base import decoder
from medmoe_jax.base.loss import logits
from medmoe_jax.checkpoints.huggingface import save_hf
from medmoe_jax.training.allocation import AllocationState, allocating
from medmoe_jax.training.step import Objective, TrainState, train_step
from tests import naive
from tests.naive import TINY, rel, tree_rel

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

MODULES = {"attn.q": "self_attn.q_proj", "attn.o": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
SPEC = BankSpec("skill", tuple(MODULES), 0, 3, rank=4, alpha=6.0, learned_scale=True)
ALLOCATOR = Allocator("skill", 1, t_init=2, t_final=5, every=4, beta1=0.8, beta2=0.7)
STEPS = 16
PLAN = BudgetSchedule(ALLOCATOR, SPEC, STEPS)
TERM = Orthonormality("skill", weight=0.1)
RATE, EPS, CLIP = 0.05, 1e-2, 0.5
KEYS = {"lora_a": "lora_A", "lora_b": "lora_B", "scale": "lora_E"}


def start_bank():
    return naive.random_banks((SPEC,), TINY, size=3.0)["skill"]


def name_of(site, n, leaf):
    return f"model.layers.{n}.{MODULES[site]}.{KEYS[leaf]}.default"


def to_peft(bank):
    """PEFT's tensors by name: A `[r, D]`, B `[O, r]`, Λ `[r, 1]` of each module."""
    out = {}
    for site, p in jax.device_get(bank).items():
        for n in range(3):
            out[name_of(site, n, "lora_a")] = p["lora_a"][n, :, 0].T
            out[name_of(site, n, "lora_b")] = p["lora_b"][n, 0].T
            out[name_of(site, n, "scale")] = p["scale"][n].T
    return {name: torch.tensor(array) for name, array in out.items()}


def from_peft(tensors):
    """The way back."""

    def stacked(site, leaf):
        layers = [tensors[name_of(site, n, leaf)].detach().numpy().T.copy() for n in range(3)]
        E_axis = {"lora_a": 2, "lora_b": 1, "scale": None}[leaf]
        return np.stack(layers) if E_axis is None else np.expand_dims(np.stack(layers), E_axis)

    return {site: {leaf: stacked(site, leaf) for leaf in KEYS} for site in MODULES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "hf"
    save_hf(path, TINY, naive.random_params(TINY), "llama")
    return path


@pytest.fixture
def theirs(folder):
    """PEFT's model with the bank's weights."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.AdaLoraConfig(
        init_r=SPEC.rank,
        target_r=ALLOCATOR.target_rank,
        tinit=ALLOCATOR.t_init,
        tfinal=ALLOCATOR.t_final,
        deltaT=ALLOCATOR.every,
        beta1=ALLOCATOR.beta1,
        beta2=ALLOCATOR.beta2,
        orth_reg_weight=TERM.weight,
        total_step=STEPS,
        lora_alpha=SPEC.alpha,
        target_modules=[module.split(".")[1] for module in MODULES.values()],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(base, config)
    parameters = lora(wrapped)
    with torch.no_grad():
        for name, tensor in to_peft(start_bank()).items():
            parameters[name].copy_(tensor)
    return wrapped


def lora(theirs):
    """A, B and Λ of every module, by name."""
    named = theirs.base_model.model.named_parameters()
    return {name: p for name, p in named if "lora_" in name}


def batch_of(t):
    """Four whole rows of random ids."""
    rng = np.random.default_rng(t)
    tokens = rng.integers(1, TINY.vocab_size, (4, 9)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(9, dtype=np.int32), (4, 1))
    return {"tokens": tokens, "segment_ids": ones, "loss_mask": ones, "positions": positions}


def their_loss(theirs, t):
    tokens = torch.tensor(batch_of(t)["tokens"], dtype=torch.long)
    return theirs(input_ids=tokens, labels=tokens)


@functools.cache
def objective():
    return Objective(AdaptedConfig(TINY, (SPEC,)), regularisers=(TERM,), specs=(SPEC,))


@functools.cache
def our_step():
    adamw = optax.adamw(RATE, eps=EPS, weight_decay=0.0)
    optimiser = optax.chain(optax.clip_by_global_norm(CLIP), allocating(adamw, {"skill": PLAN}))
    return optimiser, jax.jit(functools.partial(train_step, objective(), optimiser))


def start_state():
    trainable = {"banks": {"skill": start_bank()}, "base": {}}
    return TrainState(jnp.int32(0), trainable, our_step()[0].init(trainable))


def frozen():
    return {"base": naive.random_params(TINY), "banks": {}}


def their_update(theirs, optimiser, t):
    """One step of PEFT's training but for the allocation; returns the loss."""
    optimiser.zero_grad()
    loss = their_loss(theirs, t).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
    optimiser.step()
    return float(loss.detach())


def their_optimiser(theirs):
    trained = [p for p in theirs.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, eps=EPS, weight_decay=0.0)


def test_forward_and_loss(theirs):
    """Logits, the regularised loss, and the regulariser alone."""
    batch = batch_of(0)
    ids = [batch[k] for k in ("tokens", "segment_ids", "positions")]

    @jax.jit
    def run(banks):
        x, _, _ = model.hidden(objective().model, frozen()["base"], banks, *ids)
        return logits(TINY, decoder.head(frozen()["base"]), x)

    with torch.no_grad():
        out = their_loss(theirs, 0)
    # PEFT divides by r + 1e-5: 2.5e-6 of the bank's share.
    assert rel(run({"skill": start_bank()}), out.logits) < 2e-5
    bare = naive.logits(TINY, frozen()["base"], batch)
    assert np.abs(bare - out.logits.numpy()).max() > 0.1
    _, metrics = our_step()[1](start_state(), frozen(), batch)
    ours = metrics["loss"] + TERM.weight * metrics["orthonormality/skill"]
    assert float(ours) == pytest.approx(float(out.loss), rel=1e-5)
    assert TERM.weight * metrics["orthonormality/skill"] > 0.1


@pytest.mark.parametrize("phases", [(0, 0, 1, 300), (7, 11, 3, 97), (0, 150, 10, 1000)], ids=str)
def test_budgets(phases):
    """The same whole number of triplets at every step of long runs."""
    t_init, t_final, every, steps = phases
    plan = BudgetSchedule(Allocator("skill", 1, t_init, t_final, every), SPEC, steps)
    config = SimpleNamespace(tinit=t_init, tfinal=t_final, total_step=steps, deltaT=every)
    allocator = SimpleNamespace(peft_config=config, init_bgt=36, target_bgt=9)
    schedule_of = peft.tuners.adalora.RankAllocator.budget_schedule
    for t in range(1, steps + 1):
        assert plan.budget(t) == schedule_of(allocator, t)[0], t


def compare(t, budget, pattern, limits, state, importance, tolerance):
    """One step's budget, importance, threshold and ranks per matrix; returns the ranks."""
    assert PLAN.budget(t) == budget
    if t < PLAN.freeze:
        for got, want in zip((state.sensitivity, state.uncertainty), importance, strict=True):
            assert tree_rel(got, from_peft(want)) < tolerance, t
    if limits:
        (limit,) = limits
        scores = np.sort(np.concatenate([s.ravel() for s in adalora.scores(state).values()]))
        assert scores[35 - budget] == pytest.approx(limit, rel=tolerance), t
    if pattern is None:
        return None
    for site in MODULES:
        for n in range(3):
            assert state.kept[site][n, 0].tolist() == pattern[name_of(site, n, "scale")], (t, site)
    return [sum(kept) for kept in pattern.values()]


def schedule(theirs, monkeypatch):
    """PEFT's run: for each step t its loss, the weights before the allocation, the clipped
    gradients, the budget, the pattern of ranks (None where it is not applied), the threshold in a
    list, and the importance.
    """
    allocator, optimiser = theirs.base_model.rankallocator, their_optimiser(theirs)
    limits, kthvalue = [], torch.kthvalue

    def recorded(scores, k):
        out = kthvalue(scores, k=k)
        limits.append(float(out[0]))
        return out

    monkeypatch.setattr(torch, "kthvalue", recorded)
    for t in range(1, STEPS + 1):
        loss = their_update(theirs, optimiser, t)
        parameters = lora(theirs)
        moved = from_peft({k: p.detach().clone() for k, p in parameters.items()})
        grads = from_peft({k: p.grad.clone() for k, p in parameters.items()})
        limits.clear()
        last = theirs.peft_config["default"].rank_pattern
        theirs.base_model.update_and_allocate(t)
        pattern = theirs.peft_config["default"].rank_pattern
        applied = pattern if t > PLAN.freeze or pattern is not last else None
        importance = allocator.exp_avg_ipt, allocator.exp_avg_unc
        budget, _ = allocator.budget_schedule(t)
        yield t, loss, moved, grads, budget, applied, list(limits), importance


def test_same_weights_and_gradients(theirs, monkeypatch):
    """Ours is given PEFT's weights and clipped gradients at every step."""
    advance = jax.jit(functools.partial(adalora.advance, PLAN))
    state, ranks, masked = adalora.start(SPEC, start_bank()), [], []
    for t, _, moved, grads, budget, pattern, limits, importance in schedule(theirs, monkeypatch):
        cleared, state = advance(jnp.int32(t), moved, grads, state)
        ranks.append(compare(t, budget, pattern, limits, state, importance, 1e-5))
        after = from_peft(lora(theirs))
        for site, mask in cleared.items():
            want = np.where(mask, 0.0, moved[site]["scale"])
            np.testing.assert_array_equal(after[site]["scale"], want)
            assert np.any(mask) <= (pattern is not None)
        masked.append(pattern is not None)
    # Allocations at 4 and 8, the forced one at 11, and its mask after every later step.
    assert [t for t, on in enumerate(masked, 1) if on] == [4, 8, 11, 12, 13, 14, 15, 16]
    assert [sum(ranks[t - 1]) for t in (4, 8, 11)] == [21, 10, 9]
    assert len(set(ranks[10])) > 1 and ranks[10:] == [ranks[10]] * 6


def test_whole_runs(theirs, monkeypatch):
    """Each trains by itself: the loss and every matrix's rank agree at every step."""
    state, step = start_state(), our_step()[1]
    for t, loss, _, _, budget, pattern, limits, importance in schedule(theirs, monkeypatch):
        state, metrics = step(state, frozen(), batch_of(t))
        ours = metrics["loss"] + TERM.weight * metrics["orthonormality/skill"]
        assert float(ours) == pytest.approx(loss, rel=1e-4), t
        allocation = optax.tree.get(state.optimiser, AllocationState.__name__)
        kept = allocation.banks["skill"]
        compare(t, budget, pattern, limits, kept, importance, 1e-2)
    assert tree_rel(state.trainable["banks"]["skill"], from_peft(lora(theirs))) < 1e-3
    ranks = adalora.ranks(SPEC, state.trainable["banks"]["skill"])
    assert sum(sum(map(sum, layers)) for layers in ranks.values()) == 9
