"""Greedy decoding by transformers' `generate`, as a process of its own: prints one JSON object.

  python -m benchmarks.torch_decode ROUNDS MODEL [keep]

MODEL is `molora`, the naive rendition of `torch_peers.py`, or the path of a GGUF file. With `keep`,
in a heap that keeps its pages.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.heap import keep_pages
from benchmarks.timing import interleaved
from benchmarks.torch_peers import add_medcare, make_base
from benchmarks.variants import DECODE_ROWS, NEW, PROMPT


def load(name: str):
    """The model in float32, ready to decode."""
    if name == "molora":
        return add_medcare(make_base()).eval()
    path = Path(name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


def write(model, ids, new: int) -> None:
    """Greedily continue rows by exactly so many tokens."""
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


def main(rounds: int, name: str) -> None:
    """Time the calls side by side and print `{"seconds": {rows: s}, ...}`."""
    model = load(name)
    torch.manual_seed(1)
    ids = torch.randint(1, 8000, (max(DECODE_ROWS), PROMPT))
    with torch.inference_mode():
        calls = {
            str(rows): functools.partial(write, model, ids[:rows], NEW) for rows in DECODE_ROWS
        }
        seconds = interleaved(calls, rounds)
    print(json.dumps({"seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    if "keep" in sys.argv[3:]:
        keep_pages()
    main(int(sys.argv[1]), sys.argv[2])
