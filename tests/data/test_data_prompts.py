"""Rows put into a source's form, wherever they come from."""

import pytest

from medmoe_jax.data import builder
from medmoe_jax.data.medical.row import build, shorten
from medmoe_jax.data.prompts import Prompt
from medmoe_jax.data.sources import open_source
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import source
from tests import tiny
from tests.data.samples import conversation

ROWS = [
    conversation("fever {text}?", "yes", "cough?", "no", system="Be brief."),
    conversation("pain?", "no"),
]
FORM = "Q: {text} A:"


def opened(path, prompt):
    fields = source(str(path), prompt=prompt).to_dict()
    found = open_source("mine", fields)
    return list(found.rows), found.digest


@pytest.mark.parametrize("kind", ["file", "data set"])
def test_the_first_user_turn_of_every_row_is_put_into_the_form(kind, tmp_path):
    if kind == "file":
        path = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    else:
        path = builder.build(ROWS, tmp_path, "rows")
    rows, digest = opened(path, FORM)
    assert [[t["content"] for t in row["conversations"]] for row in rows] == [
        ["Be brief.", "Q: fever {text}? A:", "yes", "cough?", "no"],
        ["Q: pain? A:", "no"],
    ]
    assert [row["language"] for row in rows] == ["en", "en"]
    plain, plain_digest = opened(path, "{text}")
    assert plain == ROWS
    assert plain_digest != digest == opened(path, FORM)[1]


def test_a_collections_row_is_shortened_within_its_form():
    row = build("set", "en", "a long body", "b", before="<", after=">", choices=("a", "b"))
    framed = Prompt("prompt", FORM).row(row)
    assert framed.prompt == "Q: <a long body> A:"
    assert framed.prompt[slice(*framed.body)] == "a long body"
    assert shorten(framed, 14).prompt == "Q: <a long> A:"


@pytest.mark.parametrize("prompt", ["Answer.", "", "{text} {text}"])
def test_a_form_without_one_place_for_the_row(prompt, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data\.sources\.mine\.prompt: .* must hold \{text\} once"):
        opened(path, prompt)
