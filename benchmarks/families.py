"""The table of docs/families.md: every family's logits, loss and continuation beside transformers'.

  python -m benchmarks.families        # needs the extra `parity`; half a minute

It runs the cases of tests/base/test_parity.py, whose tests hold the same figures to a bound.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.pages import put
from medmoe_jax.adapters.model import AdaptedConfig
from medmoe_jax.base import decoder, loss
from medmoe_jax.checkpoints import huggingface
from medmoe_jax.inference.engine import Engine
from medmoe_jax.parallel.mesh import make_mesh
from tests.base import test_parity as parity

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
# What each case of the parity tests stands for.
CASES = {
    "qwen1.5": ("Qwen1.5", "biases on q, k, v; all heads"),
    "qwen2-tied-window": ("Qwen2", "tied; grouped heads; window from layer 1 up"),
    "qwen2.5-yarn": ("Qwen2.5", "YaRN"),
    "qwen3": ("Qwen3", "norms on q and k; tied"),
    "qwen3-biases": ("Qwen3", "biases in attention"),
    "qwen3-window": ("Qwen3", "window from layer 1 up"),
    "llama2": ("Llama 2", "all heads"),
    "llama3.2": ("Llama 3.x", "RoPE scaling `llama3`; tied; grouped heads"),
    "llama-linear": ("Llama", "RoPE scaling `linear`"),
    "llama-yarn": ("Llama", "YaRN with mscale, not truncated"),
    "llama-biases": ("Llama", "biases in attention and MLP"),
    "llama3": ("Llama 3", "grouped heads, no scaling"),
    "mistral": ("Mistral", "window on every layer"),
    "mistral-gelu": ("Mistral", "GELU, no window"),
    "ministral": ("Ministral", "windows as `layer_types` say"),
    "smollm3": ("SmolLM3", "layers that are not rotated; tied"),
    "smollm3-window": ("SmolLM3", "windows where layers are not rotated; biases"),
    "olmo2": ("OLMo 2", "norms after only; norms on all of q and k"),
    "olmo3": ("OLMo 3", "the same, and windows"),
    "olmo3-yarn": ("OLMo 3", "YaRN in the layers without a window"),
    "granite": ("Granite", "multipliers of embedding, scores, residual sum and logits"),
    "gemma2": ("Gemma 2", "alternating window, soft-caps, four norms"),
    "gemma3": ("Gemma 3", "norms on q and k; two rotary embeddings, one scaled"),
    "gemma3-tower": ("Gemma 3", "the text of a model that sees images"),
    "phi3": ("Phi-3", "fused projections; window"),
    "phi3-longrope-within": ("Phi-3", "LongRoPE, within the first context"),
    "phi3-longrope-beyond": ("Phi-3", "LongRoPE, beyond it"),
    "phi3-longrope-across": ("Phi-3", "LongRoPE, rows on both sides of it"),
    "phi4-mini": ("Phi-4-mini", "half of a head rotated; LongRoPE"),
}


def measure(name: str) -> tuple[float, float, bool]:
    """Relative error of logits and of the loss, and whether greedy continuations are equal."""
    model = parity.build(parity.CASES[name], seed=list(parity.CASES).index(name))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config, params = huggingface.load(folder, jnp.float32)
    tokens = parity.ids(2)
    x, logits = parity.ours(config, params, tokens)
    ones = jnp.ones(tokens.shape, jnp.int32)
    targets, weights = loss.next_token_targets(jnp.asarray(tokens), ones, ones)
    head = decoder.head(params)
    total = loss.cross_entropy(config, False, head, x, targets, weights) / weights.sum()
    with parity.torch.no_grad():
        want = model(parity.torch.tensor(tokens), labels=parity.torch.tensor(tokens)).loss.item()
    prompts = [parity.ids(1, n, seed=n)[0].tolist() for n in parity.PROMPTS]
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}, jax.devices()[:1])
    engine = Engine(AdaptedConfig(config), params, {}, {}, mesh, batch=len(prompts))
    got = engine.generate(prompts, max_tokens=6, stop_ids=[config.vocab_size])
    equal = all(
        continuation == parity.greedy(model, prompt)
        for prompt, continuation in zip(prompts, got, strict=True)
    )
    error = parity.error(logits, parity.theirs(model, tokens))
    return float(error), abs(float(total) / want - 1), equal


def main() -> None:
    """Print the table and put it into the page."""
    lines = ["| family | case | logits | loss | greedy |", "|---|---|---|---|---|"]
    for name in parity.CASES:
        family, case = CASES[name]
        logits, total, equal = measure(name)
        line = f"| {family} | {case} | {logits:.1e} | {total:.1e} | {'equal' if equal else 'NO'} |"
        lines.append(line)
        print(line, flush=True)
    put(PAGE, "table", "\n".join(lines))


if __name__ == "__main__":
    main()
