"""Text as it comes, against the text of all ids at once."""

import itertools

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from medmoe_jax.data.encode import Frame
from medmoe_jax.data.tokens import BYTE_TOKEN
from medmoe_jax.inference import streaming
from medmoe_jax.inference.streaming import Cutter, Detokenizer, Parting, Reader
from tests.data.conftest import (  # noqa: F401
    any_tokenizer,
    byte_level_tokenizer,
    chatml_tokenizer,
    dummy_tokenizer,
    metaspace_tokenizer,
    plain_tokenizer,
)

PROPERTY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
THOUGHT = Frame("<think>\n\n</think>\n\n", "<think>", "</think>")
OPENED = Frame("", "", "</think>")


def pieces(text, sizes):
    """A text in pieces of these sizes, over and over."""
    at, out = 0, []
    while at < len(text):
        out.append(text[at : at + sizes[len(out) % len(sizes)]])
        at += len(out[-1])
    return out


@PROPERTY
@given(data=st.data(), start=st.booleans())
def test_the_pieces_joined_are_the_decoded_text(any_tokenizer, data, start):  # noqa: F811
    """The ids are any: characters in halves, bytes that are none, marks that vanish."""
    vocabulary = st.integers(0, any_tokenizer.vocab_size - 1)
    written = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    parts = data.draw(st.lists(vocabulary.map(lambda i: [i]) | written.map(any_tokenizer.encode)))
    ids = [token for part in parts for token in part]
    shown = filter(lambda one: any_tokenizer.decode([one]), ids)
    names = (any_tokenizer.text_of(one) for one in shown)
    runs = itertools.groupby(names, lambda name: bool(BYTE_TOKEN.fullmatch(name)))
    # In a longer run of bytes, whole characters are told before its end.
    assume(all(not byte or len(list(run)) < streaming._RUN for byte, run in runs))
    stream, texts = Detokenizer(any_tokenizer, start), []
    for token in ids:
        texts.append(stream.add([token]))
        assert not texts[-1].endswith("\ufffd")
    texts.append(stream.end())
    assert "".join(texts) == any_tokenizer.decode(ids, start)


def test_text_comes_as_soon_as_it_is_whole(byte_level_tokenizer):  # noqa: F811
    """Each word with its last token, an emoji of four bytes with its fourth."""
    stream = Detokenizer(byte_level_tokenizer)
    ids = byte_level_tokenizer.encode("🩺")
    assert len(ids) > 1
    assert [stream.add([i]) for i in ids] == [""] * (len(ids) - 1) + ["🩺"]
    assert stream.add(byte_level_tokenizer.encode("a")) == "a" and stream.end() == ""


def test_a_script_that_is_bytes_alone_is_told_before_its_end(metaspace_tokenizer):  # noqa: F811
    text = "ཀཁགང" * 8
    ids = metaspace_tokenizer.encode(text)
    stream = Detokenizer(metaspace_tokenizer)
    told = [stream.add([token]) for token in ids]
    assert "".join(told[:50]) and "".join(told) + stream.end() == text


def first_stop(text, stops):
    """The text before the stop that is complete first, character by character."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


@PROPERTY
@given(
    text=st.text("ab.", max_size=20),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1),
)
def test_stops_are_found_over_the_borders_of_pieces(text, stops, sizes):
    cutter = Cutter(stops)
    got = "".join(cutter.add(piece) for piece in pieces(text, sizes)) + cutter.end()
    assert (got, cutter.stopped) == first_stop(text, stops)


def test_no_more_is_held_than_may_become_a_stop():
    cutter = Cutter(["###", "\n\nUser"])
    assert [cutter.add(t) for t in ("yes", " #", "2 ##", "\n", "no", "##")] == [
        "yes", " ", "#2 ", "##", "\nno", "",
    ]  # fmt: skip
    assert cutter.end() == "##" and not cutter.stopped


@pytest.mark.parametrize(
    ("frame", "text", "content", "reasoning"),
    [
        (THOUGHT, "<think>\n\n</think>\n\nyes", "yes", ""),
        (THOUGHT, "<think>\nIt thins.\nSo.\n</think>\n\nyes\n", "yes\n", "It thins.\nSo."),
        (THOUGHT, "\n<think>a</think>b </think> c", "b </think> c", "a"),
        (THOUGHT, "yes", "yes", ""),
        (THOUGHT, "<b>yes", "<b>yes", ""),
        (THOUGHT, "", "", ""),
        (THOUGHT, "<think>", "", ""),
        (THOUGHT, "<think>\nIt thi \n</th", "", "It thi \n</th"),
        (OPENED, "It thins.\n</think>\n\nyes", "yes", "It thins."),
        (Frame("lead "), "lead yes", "yes", ""),
        (Frame("lead "), "le", "le", ""),
        (Frame(), "<think>a</think>b", "<think>a</think>b", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_is_parted_from_the_answer(frame, text, content, reasoning, size):
    parting = Parting(frame)
    said = [*(parting.add(piece) for piece in pieces(text, [size])), parting.end()]
    assert "".join(one.content for one in said) == content
    assert "".join(one.reasoning for one in said) == reasoning


@pytest.mark.parametrize("text", ["yes, it is", "患者 fever 🩺", "yes <end> and more", "a <en"])
@pytest.mark.parametrize("ended", ["stop", "length"])
def test_an_answer_read_token_by_token_is_that_read_at_once(
    chatml_tokenizer,  # noqa: F811
    text,
    ended,
):
    """With what stopped it; a stop's text ends it before the decoder says so, and with it the ids
    that count."""
    tokenizer = chatml_tokenizer
    stop = tokenizer.special("<|im_end|>")
    ids = [*tokenizer.encode(text), *[stop] * (ended == "stop")]

    def reader():
        return Reader(Detokenizer(tokenizer), {stop}, ["<end>"])

    whole, single = reader(), reader()
    want = whole.add(ids, ended)
    got = [single.add([token]) for token in ids[:-1]] + [single.add(ids[-1:], ended)]
    assert "".join(one.content for one in got) == want.content == text.partition("<end>")[0]
    assert single.ended == whole.ended == ("stop" if "<end>" in text else ended)
    stream = Detokenizer(tokenizer)
    texts = itertools.accumulate(stream.add([token]) for token in ids)
    sizes = (n for n, so_far in enumerate(texts, 1) if "<end>" in so_far)
    assert single.taken == whole.taken == next(sizes, len(ids))
