"""PEFT, and the published methods written plainly, on transformers' model of a base from disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peer_task import DTYPES, LORA, MEDCARE, MING, Contender, batch
from benchmarks.torch_layers import add_mixture, add_peft, make_optimiser, train_step

DROPOUT = 0.05  # of the recipes
BANKS = {
    LORA: add_peft,
    MING: lambda model: add_mixture(model, shared=0, dropout=DROPOUT),
    MEDCARE: lambda model: add_mixture(model, shared=32, dropout=DROPOUT),
}


def make(who: str, recipe: str, gguf: Path, device: str) -> Contender:
    """A model with its banks in training mode, before its first step.

    On a GPU the base is bfloat16, the banks are float32, and products are as `Trainer(bf16=True)`
    makes them.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, DTYPES[device]), use_cache=False
    )
    model = BANKS[recipe](base.requires_grad_(False)).train()
    ids, target = (torch.from_numpy(x).long() for x in batch(base.config.vocab_size))
    labels = torch.where(target > 0, ids, -100)
    if device == "gpu":
        model, ids, labels = (x.to("cuda") for x in (model, ids, labels))
        model.forward = torch.autocast("cuda", dtype=torch.bfloat16)(model.forward)
    optimiser = make_optimiser(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def step() -> float:
        return train_step(model, optimiser, ids, labels).item()

    if device == "cpu":
        return Contender(step, trained)

    def waited() -> float:
        loss = step()
        torch.cuda.synchronize()
        return loss

    name = torch.cuda.get_device_name()
    return Contender(waited, trained, name, torch.cuda.max_memory_allocated)
