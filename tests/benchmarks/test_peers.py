"""The comparison: its tables, what it asks for, and that the page holds the figures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pages, peer_ours, peer_step, peer_tables, peer_task, peers, variants
from benchmarks.peer_task import LORA, MEDCARE, MING, PROMPT, ROWS, TARGETS, Contender, batch
from medmoe_jax.adapters import bank
from medmoe_jax.base import decoder
from medmoe_jax.checkpoints import gguf_models
from tests import gguf_files


def _side(seconds, first=9.0, peak=4.0, parameters=1000, loss=2.0):
    """Figures of a contender that is as fast in every way."""
    how = {"seconds": seconds, "first": first, "peak_gib": peak, "tuning": ""}
    return {"parameters": parameters, "loss": loss, "installed": how, "heap": how, "tuned": how}


def _run(recipes, **fields):
    machine = {"processor": "X", "cores": 2, "python": "3.11.2", "versions": {"jax": "1", "b": "2"}}
    about = {"date": "2026-11-27", "device": "", "dtype": "float32", "rows": 8, "tokens": 256}
    about |= {
        "targets": 1024,
        "version": "0.9",
        "rounds": 1,
        "steps": 2,
        "base": "m.gguf",
        "machine": machine,
    }
    return {**about, **fields, "recipes": recipes}


def test_a_table_tells_who_is_faster_and_who_is_not_there():
    """2,048 tokens in 2 and in 1 s, worked by hand; the median of [1, 2, 9] is 2."""
    sides = {
        "medmoe_jax": _side([1.0, 2.0, 9.0]),
        "peft": _side([1.0], first=12.0, peak=3.0),
        "tunix": {"missing": "not installed: google-tunix"},
    }
    text = peer_tables.tables({"cpu": _run({LORA: sides})})
    lines = text.split("\n")
    assert lines[0] == "### On a processor"
    assert "m.gguf, float32, 8 x 256 tokens, 1,024 of them targets; medians of 2 steps" in lines[2]
    assert (
        "2026-11-27, X, 2 cores" in lines[2]
        and "Python 3.11.2, medmoe_jax 0.9, jax 1, b 2." in lines[2]
    )
    assert "1,000 trained parameters" in lines[4]
    own, peft, tunix = lines[8:11]
    assert (
        own
        == "| medmoe_jax | 1,024 | 2 | 1.00 | 1,024 | 2 | 1.00 | 1,024 | 2 | 1.00 | 9.0 | 4.00 |"
    )
    assert peft.endswith("| 2,048 | 1 | 0.50 | 2,048 | 1 | 0.50 | 2,048 | 1 | 0.50 | 12.0 | 3.00 |")
    assert tunix == "| tunix, qwix |" + " – |" * 11
    assert "tunix, qwix: not installed: google-tunix." in lines
    lost = next(line for line in lines if line.startswith("Where medmoe_jax loses"))
    assert "the step, tuned, of PEFT, transformers is 0.50 of ours" in lost
    assert "the memory of PEFT, transformers is 0.75 of ours" in lost and "first" not in lost


def test_a_gpu_has_one_way_and_its_own_part():
    sides = {
        who: {k: v for k, v in _side([s]).items() if k not in ("heap", "tuned")}
        for who, s in (("medmoe_jax", 1.0), ("naive", 4.0))
    }
    gpu = _run({MING: sides}, device="H", dtype="bfloat16")
    text = peer_tables.tables({"gpu": gpu, "cpu": _run({MING: {"medmoe_jax": _side([1.0])}})})
    assert text.index("### On a processor") < text.index("### On a GPU")
    assert "| written plainly, PyTorch | 512 | 4 | 4.00 | 9.0 | 4.00 |" in text
    assert "medmoe_jax loses nowhere here." in text and "H, X, 2 cores" in text


def test_the_page_holds_the_committed_figures():
    results = json.loads(peers.RESULTS.read_text()) if peers.RESULTS.exists() else {}
    assert pages.shown(peers.PAGE, peer_tables.PART) == peer_tables.tables(results)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Results and page of a run of one recipe in a folder, and the base's file."""
    monkeypatch.setattr(peers, "RESULTS", tmp_path / "peers.json")
    monkeypatch.setattr(peers, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(peers, "CONTENDERS", {LORA: ("medmoe_jax", "peft", "tunix")})
    peers.PAGE.write_text("before\n<!-- figures -->old<!-- end of figures -->\nafter\n")
    (tmp_path / "m.gguf").touch()
    return tmp_path


def _measured(calls, **changed):
    """A stand-in for the processes: tunix is not there, PEFT gives what `changed` says."""

    def measured(module, arguments, how, torch, env):
        who, steps = arguments[0], arguments[4]
        calls.append((who, how, torch, env["JAX_PLATFORMS"]))
        if who == "tunix":
            return {"missing": "not installed: google-tunix"}
        figures = {"device": "", "parameters": 10, "losses": [2.0, 1.0], "first": 5.0}
        figures |= {"seconds": [1.0] * int(steps), "peak_gib": 1.0, "tuning": "heap"}
        return {**figures, **(changed if who == "peft" else {})}

    return measured


def test_rounds_alternate_and_the_other_device_stays(place, monkeypatch):
    calls = []
    monkeypatch.setattr(peers.children, "measured", _measured(calls))
    peers.RESULTS.write_text(json.dumps({"gpu": _run({LORA: {"medmoe_jax": _side([1.0])}})}))
    peers.main(["--rounds=2", "--gguf", str(place / "m.gguf")])
    first = [(who, how) for who in ("medmoe_jax", "peft") for how in peers.HOWS["cpu"]]
    assert [call[:2] for call in calls] == [*first, ("tunix", "installed"), *first[::-1]]
    assert {call[0]: call[2:] for call in calls} == {
        "medmoe_jax": (False, "cpu"), "peft": (True, "cpu"), "tunix": (False, "cpu"),
    }  # fmt: skip
    results = json.loads(peers.RESULTS.read_text())
    assert set(results) == {"cpu", "gpu"} and results["cpu"]["base"] == "m.gguf"
    assert results["cpu"]["recipes"][LORA]["peft"]["tuned"]["seconds"] == [1.0] * 4
    page = peers.PAGE.read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert peer_tables.tables(results) in page
    peers.PAGE.write_text("<!-- figures --><!-- end of figures -->")
    peers.main(["--table"])
    assert pages.shown(peers.PAGE, "figures") == peer_tables.tables(results)
    calls.clear()
    peers.main(["--quick", "--gguf", str(place / "m.gguf")])
    assert [call[:2] for call in calls] == [
        *((who, how) for who in ("medmoe_jax", "peft") for how in ("heap", "tuned")),
        ("tunix", "heap"),
    ]
    text = peer_tables.tables(json.loads(peers.RESULTS.read_text()))
    assert "targets; one step. " in text
    assert "| PEFT, transformers | 2,048 | 1 | 1.00 | 2,048 | 1 | 1.00 | 5.0 | 1.00 |" in text


@pytest.mark.parametrize(
    "changed, told",
    [({"parameters": 11}, "peft trains 11 parameters, not 10"),
     ({"losses": [2.01]}, "peft starts from 2.01, not 2.0")],
)  # fmt: skip
def test_what_is_not_the_same_model_is_not_compared(place, monkeypatch, changed, told):
    monkeypatch.setattr(peers.children, "measured", _measured([], **changed))
    with pytest.raises(SystemExit, match=told):
        peers.main(["--quick", "--gguf", str(place / "m.gguf")])
    assert not peers.RESULTS.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["--gguf=no.gguf"], ["--table"], ["--device=tpu"], ["--rounds=0"]]
)
def test_arguments_that_lead_nowhere(place, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        peers.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_a_contender_that_is_not_installed_says_so(monkeypatch, capsys):
    monkeypatch.setattr(peer_step.importlib.util, "find_spec", lambda name: None)
    peer_step.main("tunix", LORA, "m.gguf", "cpu", "1")
    assert json.loads(capsys.readouterr().out) == {"missing": "not installed: google-tunix, qwix"}


def test_the_first_step_is_told_apart():
    losses = iter([3.0, 2.0, 1.0])
    found = peer_step.measure(Contender(lambda: next(losses), 7, "H", lambda: 3 * 2**29), 2)
    assert found["losses"] == [3.0, 2.0, 1.0] and len(found["seconds"]) == 2
    assert (found["parameters"], found["device"], found["peak_gib"]) == (7, "H", 1.5)


def test_the_batch_and_the_recipes_as_shipped(tmp_path):
    ids, target = batch(100)
    assert (ids < 100).all() and ids.min() >= 0 and target.sum() == TARGETS
    assert not target[:, :PROMPT].any() and (np.diff(target) >= 0).all()
    for recipe, rates in ((LORA, {0.0}), (MING, {0.05}), (MEDCARE, {0.05})):
        config = peer_ours.recipe_on(recipe, tmp_path / "m.gguf", "gpu")
        stage = config.stages[config.stages.order[0]]
        assert {one.dropout for one in stage.banks.values()} == rates
        assert (config.base.dtype, config.run.remat) == ("bfloat16", "auto")
        assert config.data.global_batch == ROWS


@pytest.mark.parity
def test_the_plain_mixture_is_the_equations():
    """Against loops in float64, with B away from zero, so that each bank counts."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_layers import WithMixture

    torch.manual_seed(0)
    layer = WithMixture(torch.nn.Linear(5, 7, bias=False), shared=4, experts=3, rank=2).double()
    loras = [*layer.experts, layer.shared]
    for lora in loras:
        torch.nn.init.normal_(lora.b)
    x = torch.randn(4, 5, dtype=torch.float64)
    got = layer(x).detach().numpy()
    a, b = ([getattr(lora, n).detach().numpy() for lora in loras] for n in "ab")
    base, router, bias = (
        p.detach().numpy() for p in (layer.base.weight, layer.router.weight, layer.router.bias)
    )
    for token, y in zip(x.numpy(), got, strict=True):
        logits = router @ token + bias
        picks = np.argsort(-logits)[:2]
        weights = np.exp(logits[picks]) / np.exp(logits[picks]).sum()
        want = base @ token + 2.0 * b[3] @ (a[3] @ token)
        for e, w in zip(picks, weights, strict=True):
            want = want + w * 2.0 * b[e] @ (a[e] @ token)
        np.testing.assert_allclose(y, want, rtol=1e-12)


@pytest.mark.parity
def test_the_others_start_from_our_loss_and_learn(tmp_path, monkeypatch):
    """On one base: the same ids, targets and causal mask, and banks that change nothing yet."""
    from benchmarks import peer_torch, peer_tunix
    from tests.torch_side import torch  # noqa: F401  (with one thread)

    for module in (peer_task, peer_tunix):
        monkeypatch.setattr(module, "ROWS", 2)
        monkeypatch.setattr(module, "TOKENS", 12)
    monkeypatch.setattr(peer_task, "PROMPT", 5)
    path = tmp_path / "m.gguf"
    gguf_files.write(path, "qwen2", "F32", num_hidden_layers=1, tie_word_embeddings=True)
    config, params = gguf_models.load(path, jnp.float32)
    ids, target = (jnp.asarray(x) for x in batch(config.vocab_size))
    positions = jnp.broadcast_to(jnp.arange(12), ids.shape)
    hidden, _, _ = decoder.hidden(config, params, ids, jnp.ones_like(ids), positions)
    log_p = np.asarray(jax.nn.log_softmax(hidden @ decoder.head(params).T)[:, :-1])
    picked = np.take_along_axis(log_p, np.asarray(ids)[:, 1:, None], -1)[..., 0]
    want = -picked[np.asarray(target)[:, 1:] > 0].mean()
    lora = sum(bank.count(bank.abstract(spec, config)) for spec in variants.plain_lora(config))
    assert target.sum() == 2 * 7
    with jax.numpy_rank_promotion("allow"):
        for module, recipe in ((peer_torch, LORA), (peer_torch, MEDCARE), (peer_tunix, LORA)):
            contender = module.make("", recipe, path, "cpu")
            first, second = contender.step(), contender.step()
            assert first == pytest.approx(want, rel=1e-5) and second < first
            assert (contender.parameters == lora) == (recipe == LORA)
