"""The same steps in PyTorch, run as a process of its own: prints one JSON object.

  python -m benchmarks.torch_peers ROUNDS [keep]

With `keep`, in a heap that keeps its pages.
`frozen`: transformers' Qwen2, forward, loss and backward to the input embeddings. `peft_lora`: PEFT
at rank 16 on every linear layer, with AdamW. `naive_molora`: MedCare's stage 1 written plainly from
its published equations (`torch_layers.py`).
"""

from __future__ import annotations

import functools
import json
import math
import sys

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.heap import keep_pages, peak_gib
from benchmarks.timing import interleaved
from benchmarks.torch_layers import add_mixture, add_peft, make_optimiser, train_step
from benchmarks.variants import BATCH, DECODER, TOKENS


def make_base() -> Qwen2ForCausalLM:
    """A frozen Qwen2 of the benchmark's shapes with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=DECODER.vocab_size,
        hidden_size=DECODER.d_model,
        num_hidden_layers=DECODER.n_layers,
        num_attention_heads=DECODER.n_heads,
        num_key_value_heads=DECODER.n_kv_heads,
        intermediate_size=DECODER.d_ff,
        tie_word_embeddings=DECODER.tied,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config).requires_grad_(False)


def add_medcare(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """MedCare's stage 1 on a base, in place, without dropout."""
    return add_mixture(model, shared=32)


def frozen_step(model, ids) -> None:
    """Forward, loss and gradient to the input embeddings."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=x, labels=ids).loss.backward()


def main(rounds: int) -> None:
    """Time the steps side by side and print `{"seconds", "peak_gib", ...}`."""
    ids = torch.randint(0, DECODER.vocab_size, (BATCH, TOKENS))
    calls = {"frozen": functools.partial(frozen_step, make_base(), ids)}
    models = {"peft_lora": add_peft(make_base()), "naive_molora": add_medcare(make_base())}
    for name, model in models.items():
        optimiser = make_optimiser(model.train())
        calls[name] = functools.partial(train_step, model, optimiser, ids, ids)
    out = {"seconds": interleaved(calls, rounds, rare=("naive_molora",))}
    out["peak_gib"] = peak_gib()
    out["torch"], out["threads"] = torch.__version__, torch.get_num_threads()
    assert all(math.isfinite(s) for s in out["seconds"].values())
    print(json.dumps(out))


if __name__ == "__main__":
    if "keep" in sys.argv[2:]:
        keep_pages()
    main(int(sys.argv[1]))
