"""Prompts cut to their place: what stays, and how much."""

import pytest

from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.shortening import shortened
from medmoe_jax.errors import UserError
from tests.data.samples import conversation

TALK = conversation("a " * 20, "b", "c " * 20, "d", "e " * 20, system="Be brief.")["conversations"]


def letters(turns):
    return sum(len(turn["content"]) for turn in turns)


def test_what_fits_stays():
    assert shortened(TALK, letters(TALK), letters) == TALK


def test_the_oldest_questions_go_first():
    assert shortened(TALK, letters(TALK) - 1, letters) == [TALK[0], *TALK[3:]]
    assert shortened(TALK, 60, letters) == [TALK[0], TALK[5]]


@pytest.mark.parametrize("limit", range(9, 49))
def test_then_the_beginning_of_the_last_text_as_far_as_needed(limit):
    system, question = shortened(TALK, limit, letters)
    assert system == TALK[0]
    assert TALK[5]["content"].endswith(question["content"])
    assert len(question["content"]) == limit - 9


def test_a_tool_s_long_answer_is_cut_before_a_short_question():
    turns = [
        {"role": "user", "content": "how much?"},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "mg " * 30},
    ]
    cut = shortened(turns, 30, letters)
    assert cut[:2] == turns[:2] and len(cut[2]["content"]) == 21


@pytest.mark.parametrize("name", ["llama3", "gemma", "chatml", "llama2", "user_assistant"])
def test_tokens_of_a_prompt(name, any_tokenizer):
    encoder = Encoder(any_tokenizer, TEMPLATES[name])
    turns = conversation("fever and cough " * 40)["conversations"]
    whole = encoder.prompt(turns)
    frame = encoder.prompt([{"role": "user", "content": ""}])
    limit = len(frame) + 25
    ids = encoder.prompt(shortened(turns, limit, lambda some: len(encoder.prompt(some))))
    assert limit - 8 <= len(ids) <= limit  # a character may take many tokens
    text, uncut = (any_tokenizer.decode(some, start=True) for some in (ids, whole))
    assert ids[0] == whole[0] and ids[-1] == whole[-1]
    assert text[:5] == uncut[:5] and text[-12:] == uncut[-12:]
    with pytest.raises(UserError, match=r"the prompt 'fever .* does not fit: without this text"):
        shortened(turns, len(frame) - 1, lambda some: len(encoder.prompt(some)))
