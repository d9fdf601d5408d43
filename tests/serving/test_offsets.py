"""Where tokens begin in a text, against the text of all ids before them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmoe_jax.serving.offsets import TextOffsets
from tests.data.conftest import (  # noqa: F401
    any_tokenizer,
    byte_level_tokenizer,
    chatml_tokenizer,
    dummy_tokenizer,
    metaspace_tokenizer,
    plain_tokenizer,
)
from tests.inference.test_streaming import PROPERTY

WORDS = st.lists(st.sampled_from(["a", " ", "fever", " pain", "患", "者", "🩺", "é", "\n"]))


def whole(tokenizer, ids, start):
    """The whole characters of these ids."""
    return tokenizer.decode(ids, start).rstrip("\ufffd")


@PROPERTY
@given(words=WORDS)
def test_tokens_begin_where_the_text_before_them_ends(any_tokenizer, words):  # noqa: F811
    """In an answer, which may follow an echoed prompt, and in an echoed prompt of ids."""
    tokenizer = any_tokenizer
    prompt = tokenizer.encode("One 者", start=True)
    text = tokenizer.decode(prompt, start=True)
    ids = tokenizer.encode("".join(words))
    want = [len(whole(tokenizer, ids[:n], False)) for n in range(len(ids))]
    assert TextOffsets(tokenizer, prompt, text, False, False).add(ids) == want
    both = TextOffsets(tokenizer, prompt, text, False, True)
    first = [len(whole(tokenizer, prompt[:n], True)) for n in range(len(prompt))]
    got = [place for one in (*prompt, *ids) for place in both.add([one])]
    assert got == [*first, *(len(text) + place for place in want)]


@pytest.mark.parametrize("written", [True, False])
def test_marks_of_an_echoed_prompt_take_the_place_that_they_are_written_in(
    chatml_tokenizer,  # noqa: F811
    written,
):
    """Where ids are given, their text does not hold the marks."""
    tokenizer = chatml_tokenizer
    text = "<|im_start|>user\n患者 has pain<|im_end|>\n<|im_end|>fever"
    ids = tokenizer.encode_markup(text, start=True)
    text = text if written else tokenizer.decode(ids, start=True)
    places = TextOffsets(tokenizer, ids, text, written, True).add(ids)
    for token, place in zip(ids, places, strict=True):
        shown = tokenizer.decode([token])
        if not shown and written:
            shown = tokenizer.text_of(token)
        if "\ufffd" not in shown:
            assert text[place:].startswith(shown), (shown, place)
    assert places == sorted(places)
