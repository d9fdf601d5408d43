"""The same steps in PyTorch, run as a process of its own: prints one JSON object.

  python -m benchmarks.torch_peers ROUNDS [keep]

With `keep`, in a heap that keeps its pages.
`frozen`: transformers' Qwen2, forward, loss and backward to the input embeddings. `peft_lora`: PEFT
at rank 16 on every linear layer, with AdamW. `naive_molora`: MedCare's stage 1 written plainly from
its published equations: all experts for all tokens, stacked, then gathered.
Axes: N tokens, D input width, O output width, E experts, K picks, r rank.
"""

from __future__ import annotations

import functools
import json
import math
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.heap import keep_pages, peak_gib
from benchmarks.timing import interleaved
from benchmarks.variants import BATCH, DECODER, TOKENS


class Lora(nn.Module):
    """`s B A x`."""

    def __init__(self, d_in: int, d_out: int, rank: int, s: float = 2.0):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.s = s

    def forward(self, x):
        """x `[..., D]` to `[..., O]`."""
        return self.s * nn.functional.linear(nn.functional.linear(x, self.a), self.b)


class WithLora(nn.Module):
    """A frozen linear layer beside one LoRA."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base, self.lora = base, Lora(base.in_features, base.out_features, rank)

    def forward(self, x):
        """`W x + s B A x`."""
        return self.base(x) + self.lora(x)


class WithMixture(nn.Module):
    """A frozen linear layer beside 8 routed experts, top-2, and a shared LoRA of rank 32."""

    def __init__(self, base: nn.Linear, experts: int = 8, top_k: int = 2, rank: int = 16):
        super().__init__()
        shape = base.in_features, base.out_features
        self.base, self.top_k = base, top_k
        self.router = nn.Linear(base.in_features, experts)
        self.experts = nn.ModuleList(Lora(*shape, rank) for _ in range(experts))
        self.shared = Lora(*shape, 2 * rank)

    def forward(self, x):
        """`W x + Σ_k w_k s B_k A_k x + s B A x`."""
        top, picks = self.router(x).topk(self.top_k, dim=-1)
        weights = top.softmax(dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        index = picks[..., None].expand(*picks.shape, every.shape[-1])
        picked = every.gather(-2, index)
        return self.base(x) + (weights[..., None] * picked).sum(-2) + self.shared(x)


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
    """MedCare's stage 1 on a base, in place."""
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, WithLora(getattr(layer.self_attn, name), 16))
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, WithMixture(getattr(layer.mlp, name)))
    return model


def add_peft(model: Qwen2ForCausalLM):
    """PEFT's LoRA of rank 16 on every linear layer."""
    names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))


def frozen_step(model, ids) -> None:
    """Forward, loss and gradient to the input embeddings."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=x, labels=ids).loss.backward()


def train_step(model, optimiser, ids) -> None:
    """One clipped AdamW step."""
    optimiser.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()


def main(rounds: int) -> None:
    """Time the steps side by side and print `{"seconds", "peak_gib", ...}`."""
    ids = torch.randint(0, DECODER.vocab_size, (BATCH, TOKENS))
    calls = {"frozen": functools.partial(frozen_step, make_base(), ids)}
    for name, add in (("peft_lora", add_peft), ("naive_molora", add_medcare)):
        model = add(make_base()).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
        calls[name] = functools.partial(train_step, model, optimiser, ids)
    out = {"seconds": interleaved(calls, rounds, rare=("naive_molora",))}
    out["peak_gib"] = peak_gib()
    out["torch"], out["threads"] = torch.__version__, torch.get_num_threads()
    assert all(math.isfinite(s) for s in out["seconds"].values())
    print(json.dumps(out))


if __name__ == "__main__":
    if "keep" in sys.argv[2:]:
        keep_pages()
    main(int(sys.argv[1]))
