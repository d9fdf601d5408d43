"""The language of rows: named, detected, or unknown and counted."""

import pytest

from medmoe_jax.data import languages
from medmoe_jax.data.encode import Encoder
from medmoe_jax.data.layouts import TEMPLATES
from medmoe_jax.data.sources import open_sources
from medmoe_jax.errors import UserError
from medmoe_jax.training.config import recipe, source
from tests import tiny
from tests.data.samples import conversation

KNOWN = ("en", "de", "zh", "sw")
TEXTS = {
    "en": "What helps against a headache? Aspirin helps, and so does a good night's sleep.",
    "de": "Was hilft gegen Kopfschmerzen? Aspirin hilft, und ausreichend Schlaf auch.",
    "zh": "头痛怎么办？可以服用阿司匹林，也要好好休息。",
    "sw": "Ni nini dalili za malaria? Homa kali, maumivu ya kichwa na kutetemeka kwa mwili.",
}


def halves(text):
    middle = len(text) // 2
    return text[:middle], text[middle:]


def test_texts_are_recognised():
    detect = languages.detector(0.5)
    assert {code: detect(text) for code, text in TEXTS.items()} == {c: c for c in TEXTS}


def test_an_unsure_detector_names_no_language():
    sure, lax, off = (languages.detector(least) for least in (0.9, 0.01, 0.0))
    assert lax("aspirin 500 mg") != "" and sure("aspirin 500 mg") == ""
    for empty in ("", "12 34 5", "???"):
        assert sure(empty) == ""
    assert off(TEXTS["en"]) == ""


@pytest.mark.parametrize("least", [-0.1, 1.5])
def test_a_threshold_is_a_probability(least):
    with pytest.raises(UserError, match=r"language is .*; give 0 to 1 \(data\.detect_language"):
        languages.detector(least)


def test_rows_get_their_language_and_are_counted():
    french = "Qu'est-ce qui aide contre les maux de tête, docteur ?"
    texts = [*TEXTS.values(), "aspirin 500", french]
    rows = [conversation(*halves(text), language="") for text in texts]
    rows.append(conversation("What helps?", "Sleep.", language="de"))  # what it names holds
    named, counts = languages.name_languages(rows, KNOWN, languages.detector(0.5))
    # French is recognised, but is not among the known languages.
    assert [row["language"] for row in named] == ["en", "de", "zh", "sw", "", "", "de"]
    assert counts == {"named": 1, "detected": 4, "unknown": 2}
    assert [row["conversations"] for row in named] == [row["conversations"] for row in rows]
    assert len(named) == 7 and rows[0]["language"] == ""


def test_the_system_turn_is_not_read():
    row = conversation(*halves(TEXTS["sw"]), language="")
    row["conversations"].insert(0, {"role": "system", "content": TEXTS["en"] * 3})
    ((code, named),) = languages.row_languages([row], languages.detector(0.5))
    assert (code, named) == ("sw", False)


def test_an_unknown_code_names_row_and_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "a", "response": "b", "language": "en"}\n'
        '{"prompt": "a", "response": "b", "language": "xx"}\n'
    )
    config = recipe()
    config.data.sources.mine = source(str(path))
    config.data.detect_language = 0.0
    encoder = Encoder(tiny.tokenizer(), TEMPLATES["plain"], languages=dict.fromkeys(KNOWN, 0))
    with pytest.raises(UserError, match=r"mine\.jsonl, line 2: .* is in 'xx', a language that"):
        open_sources(config.data.to_dict(), ["mine"], encoder)
