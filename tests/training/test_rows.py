"""What becomes of rows before a stage trains: named, counted, split, and part of the recipe."""

import numpy as np
import pytest

from medmoe_jax.data.builder import build_from_files
from medmoe_jax.errors import UserError
from medmoe_jax.training import reading
from medmoe_jax.training.config import source
from medmoe_jax.training.reading import open_data, open_rows
from medmoe_jax.training.run import Run
from medmoe_jax.training.setup import open_setup
from medmoe_jax.training.train import train
from tests import tiny
from tests.data import chat_templates

TWO = {
    "messages": [
        {"role": "user", "content": "aspirin?"},
        {"role": "assistant", "content": "pain"},
        {"role": "user", "content": "insulin?"},
        {"role": "assistant", "content": "sugar"},
    ]
}
# Refuses a system turn.
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`recipe(template, rows, **fields of data)` and what was noted of its sources."""
    notes = []
    monkeypatch.setattr(reading, "note", notes.append)

    def make(template, rows, **fields):
        (tmp_path / "chat.jinja").write_text(template)
        config = tiny.medcare_config()
        config.data.template = str(tmp_path / "chat.jinja")
        config.data.length = 120
        config.data.update(fields)
        path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
        config.data.sources.alignment = source(str(path))
        return config

    return make, notes


def test_a_conversation_of_several_training_rows(recipe):
    make, notes = recipe
    setup = open_setup(make(chat_templates.THINKING, [TWO] * 8))
    stage = setup.stages[1]
    opened = open_rows(setup, [stage])
    data = open_data(setup, stage, opened)
    batch = next(data.stream)
    counts = data.stream.counters()
    data.stream.close()
    assert len(opened["alignment"].rows) == 16 and opened["alignment"].rows.conversations == 8
    assert any("its 8 rows are 16 training rows" in note for note in notes)
    assert counts["rows"] == batch["segment_ids"].max(axis=1).sum()
    words, found = setup.tokenizer, set()
    for tokens, mask, segments in zip(
        batch["tokens"], batch["loss_mask"], batch["segment_ids"], strict=True
    ):
        for segment in range(1, segments.max() + 1):
            found.add(words.decode(tokens[(segments == segment) & (mask == 1)]))
    empty = "<think>\n\n</think>\n\n"
    assert found == {f"{empty}pain<|im_end|>", f"{empty}sugar<|im_end|>"}


def test_rows_of_every_stage_are_tried_before_the_first(recipe, tmp_path):
    make, _ = recipe
    bad = {**TWO, "system": "no"}
    config = make(REFUSES + chat_templates.PLAIN, [TWO] * 20 + [bad])
    config.stages.aggregate.mixture = {"knowledge": 1.0}
    with pytest.raises(UserError, match=r"rows\.jsonl, line 21: .* refuses .*: no system"):
        train(Run(open_setup(config), tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_what_is_left_out_and_cut_is_said(recipe):
    make, notes = recipe
    config = make(chat_templates.PLAIN, [{**TWO, "id": n} for n in range(8)], ignore=("id",))
    config.data.length = 48
    setup = open_setup(config)
    opened = open_rows(setup, [setup.stages[1]])
    text = " ".join(notes)
    assert "left out of its rows: id (8)" in text
    assert "8 of 8 rows are cut at 48 tokens, and 0 hold no target" in text
    assert opened["alignment"].rows.counts.truncated_rows == 8
    config.data.length = 20
    with pytest.raises(UserError, match="none of its 8 rows has a target within 20 tokens"):
        open_rows(open_setup(config), [setup.stages[1]])
    config.data.length = 1
    with pytest.raises(UserError, match=r"^data\.length: 1 is below 2$"):
        open_rows(open_setup(config), [setup.stages[1]])
    config.data.ignore = ()
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: nothing is known of 'id'"):
        open_rows(open_setup(config), [setup.stages[1]])


@pytest.mark.parametrize("built", [False, True])
def test_keys_of_a_built_source_are_left_out_and_counted_once(recipe, tmp_path, built):
    make, notes = recipe
    turns = [TWO["messages"][0], {**TWO["messages"][1], "reasoning_content": "hm"}]
    config = make(chat_templates.PLAIN, [{"messages": turns}] * 8, languages="families")
    if built:
        path = config.data.sources.alignment.path
        config.data.sources.alignment.path = str(build_from_files([path], tmp_path, "rows"))
    setup = open_setup(config)
    with pytest.raises(UserError, match=r"row.* has no place for reasoning"):
        open_rows(setup, [setup.stages[1]])
    config.data.ignore = ("reasoning_content",)
    setup = open_setup(config)
    rows = open_rows(setup, [setup.stages[1]])["alignment"].rows
    assert [rows[0]["tokens"].tolist()] * 8 == [row["tokens"].tolist() for row in rows]
    assert any("left out of its rows: reasoning_content (8)" in note for note in notes)


def test_options_reach_training_and_belong_to_the_recipe(recipe, tmp_path):
    make, _ = recipe
    thinking = make(chat_templates.THINKING, [TWO] * 8)
    plain = thinking.copy_and_resolve_references()
    plain.data.template_options.enable_thinking = False
    setups = [open_setup(config) for config in (thinking, plain)]
    runs = [Run(setup, tmp_path / "w") for setup in setups]
    prompts = [setup.encoder.prompt(TWO["messages"][:1]) for setup in setups]
    assert len(prompts[0]) < len(prompts[1]) and prompts[1][: len(prompts[0])] == prompts[0]
    runs[0].stages[0].claim({})
    with pytest.raises(
        UserError, match=r"data\.template_options\.enable_thinking: None then, False now"
    ):
        runs[1].stages[0].claim({})
    plain.data.template_options.thinking = True
    with pytest.raises(UserError, match=r"data\.template_options\.thinking: the chat template has"):
        open_setup(plain)


def test_a_template_without_an_end_for_this_vocabulary(recipe):
    make, _ = recipe
    config = make("{% for m in messages %}{{ m.content }}\n{% endfor %}", [TWO])
    with pytest.raises(UserError, match="nothing after an answer that could end it"):
        open_setup(config)


def test_columns_and_forms_in_a_source(recipe, tmp_path):
    make, _ = recipe
    config = make(chat_templates.PLAIN, [TWO])
    path = tmp_path / "rows.csv"
    path.write_text("Frage,Antwort\n" + "aspirin?,pain\n" * 8)
    columns = {"question": "Frage", "answer": "Antwort"}
    config.data.sources.alignment = source(str(path), columns=columns)
    setup = open_setup(config)
    rows = open_rows(setup, [setup.stages[1]])["alignment"].rows
    assert len(rows) == 8 and rows.counts.target_tokens == 8 * np.sum(rows[0]["loss_mask"])
    config.data.sources.alignment.columns = {"frage": "Frage"}
    with pytest.raises(UserError, match=r"data\.sources\.alignment\.columns\.frage: no row has"):
        open_rows(open_setup(config), [setup.stages[1]])
