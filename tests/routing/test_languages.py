"""The language tables: the published ones, a user's own, and what is wrong with them."""

import pytest

from medmoe_jax.errors import UserError
from medmoe_jax.routing.languages import published, read_languages


def test_published_tables():
    assert published() == ("families", "major")
    families = read_languages("families")
    assert len(families.ids) == 50 and len(families.experts) == 7
    sizes = [list(families.ids.values()).count(e) for e in range(7)]
    assert sizes == [1, 3, 3, 5, 27, 4, 7]
    assert families.ids["zh"] == 0 and families.ids["sw"] == 6 and families.names["mt"] == "Maltese"
    major = read_languages("major")
    assert [major.ids[c] for c in ("ar", "de", "en", "ja", "zh")] == [0, 1, 2, 7, 11]


def test_a_language_joins_a_family_without_a_new_expert(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("code,expert\nen,west\nde,west\nzh,east\n")
    before = read_languages(str(path))
    path.write_text("code,expert,name\nen,west,\nde,west,\nzh,east,\nyo,west,Yoruba\n")
    after = read_languages(str(path))
    assert after.experts == before.experts == ("west", "east")
    assert after.ids == {**before.ids, "yo": 0} and after.names["yo"] == "Yoruba"
    assert after.names["en"] == "en"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code,expert\nen,a\nen,b\n", r"mine\.csv:3: language 'en' stands there twice"),
        ("code,expert\nen,\n", r"mine\.csv:2: a row needs a code and an expert"),
        ("language,family\nen,a\n", r"mine\.csv: the first line names the columns"),
        ("code,expert\n", r"mine\.csv: no language"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_languages(str(path))


def test_unknown_table():
    with pytest.raises(UserError, match=r"^languages: 'nowhere' is neither.*families, major"):
        read_languages("nowhere")
