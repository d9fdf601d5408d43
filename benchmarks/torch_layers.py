"""Banks of LoRA in PyTorch, as plain as the published code, and a training step.

`WithMixture` follows the equations of MING-MOE and MedCare: all experts for all tokens, stacked,
then gathered. Nothing here imports JAX, so that a process's memory is PyTorch's alone.
Axes: D input width, O output width, E experts, K picks, r rank.
"""

from __future__ import annotations

import torch
from torch import nn

ATTENTION = tuple(f"{n}_proj" for n in "qkvo")
MLP = ("gate_proj", "up_proj", "down_proj")


class Lora(nn.Module):
    """`s B A x`, with dropout on x."""

    def __init__(self, d_in: int, d_out: int, rank: int, s: float = 2.0, dropout: float = 0.0):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.s, self.dropout = s, nn.Dropout(dropout)

    def forward(self, x):
        """x `[..., D]` to `[..., O]`."""
        h = nn.functional.linear(self.dropout(x), self.a)
        return self.s * nn.functional.linear(h, self.b)


class WithLora(nn.Module):
    """A frozen linear layer beside one LoRA."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.lora = Lora(base.in_features, base.out_features, rank, dropout=dropout)

    def forward(self, x):
        """`W x + s B A x`."""
        return self.base(x) + self.lora(x)


class WithMixture(nn.Module):
    """A frozen linear layer beside 8 routed experts, top-2, and a LoRA that all tokens share.

    Dropout is not applied here: the published modules configure it and leave it out.
    """

    def __init__(
        self, base: nn.Linear, shared: int, experts: int = 8, top_k: int = 2, rank: int = 16
    ):
        super().__init__()
        shape = base.in_features, base.out_features
        self.base, self.top_k = base, top_k
        self.router = nn.Linear(base.in_features, experts)
        self.experts = nn.ModuleList(Lora(*shape, rank) for _ in range(experts))
        self.shared = Lora(*shape, shared) if shared else None

    def forward(self, x):
        """`W x + Σ_k w_k s B_k A_k x`, and `+ s B A x` of the shared one."""
        top, picks = self.router(x).topk(self.top_k, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        weights = top.softmax(dim=-1).to(every.dtype)
        index = picks[..., None].expand(*picks.shape, every.shape[-1])
        picked = every.gather(-2, index)
        y = self.base(x) + (weights[..., None] * picked).sum(-2)
        return y if self.shared is None else y + self.shared(x)


def add_mixture(model, shared: int, dropout: float = 0.0):
    """Banks on a frozen base, in place: LoRA on attention, a mixture on every feed-forward layer.

    Args:
      model: a causal language model of the Llama or Qwen2 kind.
      shared: rank of MedCare's knowledge bank; 0 = none, which is MING-MOE.
      dropout: of the attention's LoRA.
    """
    for layer in model.model.layers:
        for name in ATTENTION:
            base = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, WithLora(base, 16, dropout))
        for name in MLP:
            setattr(layer.mlp, name, WithMixture(getattr(layer.mlp, name), shared))
    return model


def add_peft(model):
    """PEFT's LoRA of rank 16 on every linear layer."""
    from peft import LoraConfig, get_peft_model  # the rest here does without it

    names = [*ATTENTION, *MLP]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=names))


def make_optimiser(model) -> torch.optim.AdamW:
    """AdamW on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)


def train_step(model, optimiser, ids, labels) -> torch.Tensor:
    """One clipped AdamW step; gives the loss. A label of −100 is no target."""
    optimiser.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
    optimiser.step()
    return loss.detach()
