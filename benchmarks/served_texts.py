"""Greedy answers of exported models in a server's own library, run by that library's Python.

  python benchmarks/served_texts.py vllm|transformers FOLDER PROMPTS.json TOKENS OUTPUT [ADAPTER]

Writes `{"versions", "answers"}` as JSON; an answer has the `prompt` ids that the exported template
gives, the `ids` and the `text` that follow, and at each of them the `gap` in nats between the two
likeliest. Nothing of medmoe_jax is imported.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

RANKS = (8, 16, 32, 64, 128, 256)  # of `max_lora_rank`


def in_vllm(folder: str, prompts: list[str], tokens: int, adapter: str) -> list[dict]:
    """The answers of vLLM on CPU in float32."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        enable_lora=bool(adapter),
        **({"max_lora_rank": _rank(adapter)} if adapter else {}),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=2)
    chats = [[{"role": "user", "content": text}] for text in prompts]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    answers = []
    for done in model.chat(chats, sampling, lora_request=request, use_tqdm=False):
        said = done.outputs[0]
        best = [sorted((p.logprob for p in of.values()), reverse=True) for of in said.logprobs]
        answers.append(
            {
                "prompt": list(done.prompt_token_ids),
                "ids": list(said.token_ids),
                "text": said.text,
                "gap": [first - second for first, second, *_ in best],
            }
        )
    return answers


def _rank(adapter: str) -> int:
    """The least `max_lora_rank` that holds every module of an adapter."""
    options = json.loads(Path(adapter, "adapter_config.json").read_text())
    most = max([options["r"], *(options.get("rank_pattern") or {}).values()])
    return next(rank for rank in RANKS if rank >= most)


def in_transformers(folder: str, prompts: list[str], tokens: int, adapter: str) -> list[dict]:
    """The answers of transformers, and PEFT, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    answers = []
    for text in prompts:
        chat = [{"role": "user", "content": text}]
        given = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        done = model.generate(
            **given,
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = given["input_ids"][0].tolist()
        ids = done.sequences[0].tolist()[len(prompt) :]
        pairs = [logits[0].topk(2).values.tolist() for logits in done.logits]
        answers.append(
            {
                "prompt": prompt,
                "ids": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "gap": [first - second for first, second in pairs],
            }
        )
    return answers


# What answers, and whose versions matter.
READERS = {
    "vllm": (in_vllm, ("vllm-cpu", "torch", "transformers")),
    "transformers": (in_transformers, ("transformers", "peft", "torch")),
}


def main(
    reader: str, folder: str, prompts: str, tokens: str, output: str, adapter: str = ""
) -> None:
    """Write what a reader answers."""
    answer, libraries = READERS[reader]
    answers = answer(folder, json.loads(Path(prompts).read_text()), int(tokens), adapter)
    versions = {name: importlib.metadata.version(name) for name in libraries}
    Path(output).write_text(json.dumps({"versions": versions, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
