"""What the command line shows of rows, and tokenizers trained from them."""

import json

import numpy as np
import pytest
from rich.console import Console

from medmoe_jax.data import builder, preview
from medmoe_jax.data import tokenizers as tk
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.rows import RowReader
from medmoe_jax.data.sources import open_path
from medmoe_jax.errors import UserError
from tests import tiny
from tests.data import chat_templates
from tests.data.samples import CHATML, conversation, texts
from tests.data.test_jinja_template import encoder as jinja_encoder

ROWS = [conversation("fever " * i, "pneumonia " * (i + 1)) for i in range(1, 21)]


@pytest.fixture(params=["file", "data set"])
def source(request, tmp_path):
    if request.param == "file":
        path = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    else:
        path = builder.build(ROWS, tmp_path, "demo")
    return open_path(path, RowReader())


def inspected(source, encoder, **options):
    console = Console(record=True, width=120)
    found = preview.inspect(source, encoder, console=console, **options)
    return found, console.export_text()


def test_inspect_prints_rows_and_what_all_hold(source, chatml_tokenizer):
    encoder = Encoder(chatml_tokenizer, TEMPLATES["chatml"])
    found, shown = inspected(source, encoder, length=40, first=2, count=2)
    assert "row 2 of 20, language en" in shown and "row 3 of 20" in shown
    assert "row 1 of 20" not in shown and "row 4 of 20" not in shown
    assert source.rows.place(3).rpartition(" ")[2] in shown and "fever fever fever" in shown
    assert "</s> (id 2)" in shown and "<|im_end|> (id 5)" in shown and "truncated rows" in shown
    assert "language en: 20 rows name it, in 0 detected" in shown
    sizes = [len(encoder(row).tokens) for row in ROWS]
    targets = [int(encoder(row).loss_mask.sum()) for row in ROWS]
    assert found["length p50"] == np.median(sizes) and found["length p100"] == max(sizes)
    assert found["truncated rows %"] == 100 * np.mean(np.array(sizes) > 40)
    assert (found["tokens"], found["targets"]) == (sum(sizes), sum(targets))
    assert found["exact duplicates"] == 0 and found["training rows"] == 20
    with pytest.raises(UserError, match="row 20: there are rows 0 to 19"):
        preview.inspect(source, encoder, first=20)
    with pytest.raises(UserError, match="length: 0 is below 1"):
        preview.inspect(source, encoder, length=0)
    with pytest.raises(UserError, match="rows: -1 is below 0"):
        preview.inspect(source, encoder, count=-1)


def test_duplicates_left_out_keys_and_doubts(tmp_path, plain_tokenizer):
    pair = {"prompt": "Was hilft gegen starke Kopfschmerzen?", "response": "Viel Schlaf."}
    rows = [pair | {"id": 1}, {"prompt": "q", "response": "a"}, pair | {"language": "de"}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    encoder = Encoder(plain_tokenizer, TEMPLATES["chatml"])
    found, shown = inspected(open_path(path, RowReader(ignore=("id",))), encoder)
    assert found["exact duplicates"] == 1
    flat = " ".join(shown.split())
    assert "exact duplicates: " in flat and "rows.jsonl, line 3 = " in flat
    assert "left out of the rows: id (1)" in flat
    assert "its marks <|im_start|>, <|im_end|> are no tokens" in flat
    assert "language de: 1 rows name it, in 1 detected" in flat
    tiny.write_rows(path, [])
    with pytest.raises(UserError, match="no row to look at"):
        inspected(open_path(path, RowReader()), encoder)


def test_every_training_row_of_a_conversation_is_shown(tmp_path, byte_level_tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [conversation("q", "a", "r", "b")])
    encoder = jinja_encoder(byte_level_tokenizer, chat_templates.THINKING)
    found, shown = inspected(open_path(path, RowReader()), encoder)
    assert "row 0 of 1, training row 1 of 2" in shown and "training row 2 of 2" in shown
    assert found["training rows"] == 2


def test_a_row_that_cannot_be_used_is_named(tmp_path, byte_level_tokenizer):
    rows = [conversation("q", "a"), conversation("q", "a", system="s")]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    encoder = jinja_encoder(byte_level_tokenizer, refuses + chat_templates.PLAIN)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .* refuses .*: no system"):
        inspected(open_path(path, RowReader()), encoder)


def test_colours_follow_the_mask(chatml_tokenizer):
    row = conversation("fever", "pneumonia")
    encoder = Encoder(chatml_tokenizer, TEMPLATES["chatml"])
    (runs,) = encoder.runs(row)

    def styled(text, style):
        return "".join(text.plain[s.start : s.end] for s in text.spans if s.style == style)

    whole = preview.coloured(runs, chatml_tokenizer, 1000)
    assert styled(whole, preview.TARGET) == "pneumonia<|im_end|>"
    assert styled(whole, preview.CUT) == ""
    prompt = len(encoder.prompt(row["conversations"][:1]))
    cut = preview.coloured(runs, chatml_tokenizer, prompt)
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
