"""What the command line shows of a data set, and tokenizers trained from data."""

import json

import numpy as np
import pytest
from rich.console import Console

from medmoe_jax.data import builder, preview
from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.templates import TEMPLATES
from medmoe_jax.errors import UserError
from tests.data.samples import CHATML, conversation, texts


@pytest.fixture
def dataset(tmp_path):
    rows = [conversation("fever " * i, "pneumonia " * (i + 1)) for i in range(1, 21)]
    return builder.build(rows, tmp_path, "demo")


def test_inspect_prints_a_row_and_statistics(dataset, chatml_tokenizer):
    console = Console(record=True, width=120)
    found = preview.inspect(dataset, chatml_tokenizer.path, length=40, row=2, console=console)
    shown = console.export_text()
    assert "row 2 of 20, language en" in shown and "fever fever fever" in shown
    assert "</s> (id 2)" in shown and "<|im_end|> (id 5)" in shown and "truncated rows" in shown
    encoder = Encoder(chatml_tokenizer, TEMPLATES["chatml"])
    sizes = [len(encoder(row).codes) for row in builder.open_dataset(dataset)]
    assert found["length p50"] == np.median(sizes) and found["length p100"] == max(sizes)
    assert found["truncated rows %"] == 100 * np.mean(np.array(sizes) > 40)
    with pytest.raises(UserError, match=r"row 20: .* has rows 0 to 19"):
        preview.inspect(dataset, chatml_tokenizer.path, row=20)


def test_colours_follow_the_mask(chatml_tokenizer):
    row = conversation("fever", "pneumonia")
    encoder = Encoder(chatml_tokenizer, TEMPLATES["chatml"])

    def styled(text, style):
        return "".join(text.plain[s.start : s.end] for s in text.spans if s.style == style)

    whole = preview.coloured(row, encoder, 1000)
    assert styled(whole, preview.TARGET) == "pneumonia<|im_end|>"
    assert styled(whole, preview.CUT) == ""
    cut = preview.coloured(row, encoder, len(encoder.prompt(row["conversations"][:1])))
    assert styled(cut, preview.TARGET) == "" and styled(cut, preview.CUT).startswith("pneumonia")


def test_train_tokenizer_from_files_and_data_sets(tmp_path):
    pairs = [{"prompt": text, "response": text} for text in texts()]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    built = builder.build_from_files([tmp_path / "d.jsonl"], tmp_path / "out")
    first = preview.train_tokenizer([tmp_path / "d.jsonl"], 450, tmp_path / "one.model")
    second = preview.train_tokenizer([built], 450, tmp_path / "two.model")
    assert first.digest == second.digest
    assert [first.special(s) for s in CHATML] == [4, 5]
    gemma = preview.train_tokenizer([built], 450, tmp_path / "three.model", "gemma")
    assert [gemma.special(s) for s in ("<start_of_turn>", "<end_of_turn>")] == [4, 5]
    assert isinstance(tk.load(tmp_path / "two.model"), tk.SentencePiece)
    with pytest.raises(UserError, match="no input given"):
        preview.train_tokenizer([], 450, tmp_path / "four.model")
