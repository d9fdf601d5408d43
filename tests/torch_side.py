"""How transformers and PEFT load a folder, for parity tests; skips them where torch is absent."""

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)
peft = pytest.importorskip("peft", exc_type=ImportError)
# The models are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)

# The parts that a model has beside the decoder, as small as they may be.
VISION = dict(
    vision_config=dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
    mm_tokens_per_image=1,
    image_token_index=52,
    boi_token_index=51,
    eoi_token_index=50,
)


def load_model(folder, dtype=torch.float32):
    """The model in a folder, with every tensor found."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype=dtype
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def load_adapter(base_folder, folder, dtype=torch.float32):
    """The model in a folder under the adapter in another."""
    return peft.PeftModel.from_pretrained(load_model(base_folder, dtype), folder)


def logits(model, ids_BxT):
    """A model's logits as float32 numpy."""
    with torch.no_grad():
        return model.eval()(torch.tensor(ids_BxT)).logits.float().numpy()
