"""Adapter directories as other tools write them, for the tests that read them."""

import json

from safetensors.numpy import save_file

from tests import torch_zip

R = 2


def module(layer, site):
    part, name = site.split(".")
    return f"model.layers.{layer}.{'self_attn' if part == 'attn' else 'mlp'}.{name}_proj"


def write(folder, lora=None, pickled=None, tensors=None, top_k=2, **options):
    """A directory: PEFT's adapter, the pickled rest, a second stage's file."""
    folder.mkdir(exist_ok=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": targets, **options}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"num_experts_per_token": top_k}))
    if lora is not None:
        save_file(lora, folder / "adapter_model.safetensors")
    if pickled is not None:
        torch_zip.save(folder / "non_lora_trainables.bin", pickled)
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder
