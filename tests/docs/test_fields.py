"""The reference of the configuration: no field is left out, and none is without a meaning."""

import re
from pathlib import Path

import pytest

from docs.making import fields
from medmoe_jax.training import config

PAGE = Path(__file__).parents[2] / "docs" / "configs.md"
# What makes a section; the classes of a decoder are not made by a function of the recipe.
MAKERS = {
    "base": lambda: config.recipe().base,
    "data": lambda: config.recipe().data,
    "run": lambda: config.recipe().run,
    "source": config.source,
    "stage": config.stage,
    "bank": config.bank,
    "evaluation": config.evaluation,
    "orthogonality": lambda: config.orthogonality("a", "b"),
    "orthonormality": lambda: config.orthonormality("a"),
    "sparsity": lambda: config.sparsity("a"),
    "allocator": lambda: config.allocator("a", 1),
}


@pytest.mark.parametrize("section", fields.SECTIONS)
def test_every_field_has_a_meaning(section):
    found = fields.fields(section)
    assert not [field.names for field in found if not field.meaning], section
    names = [name for field in found for name in field.names]
    assert len(names) == len(set(names))
    if section in MAKERS:
        made = MAKERS[section]()
        assert set(names) == set(made) - {"kind"}
        for field in found:
            for name, default in zip(field.names, field.defaults, strict=True):
                if re.fullmatch(r"[\d.e-]+|True|False|'[^']*'", default):
                    assert eval(default) == made[name], name


def test_the_page_has_every_section_once():
    text = PAGE.read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- fields: (\w+) -->", text)) == sorted(fields.SECTIONS)


def test_fields_of_every_kind_of_source(tmp_path):
    source = tmp_path / "some.py"
    source.write_text(
        "class Some:\n"
        '    """Something.\n\n'
        "    Attributes:\n"
        "      a, b: two that\n"
        "        go together.\n"
        "      c: with a: colon.\n\n"
        "    Raises:\n"
        "      UserError: never.\n"
        '    """\n'
        "    a: int\n    b: float = 0.5\n    c: str = ''\n    d: int = 1\n"
        "def made(x, y=(1, 2)):\n"
        '    """Makes.\n\n    Args:\n      y: a pair.\n    """\n'
    )
    assert fields.described_class(source, "Some", {"a"}) == [
        (("b",), ("0.5",), "two that go together."),
        (("c",), ("''",), "with a: colon."),
        (("d",), ("1",), ""),
    ]
    assert fields.described_arguments(source, "made") == [
        (("y",), ("(1, 2)",), "a pair."),
        (("x",), ("",), ""),
    ]
    code = (
        "def recipe():\n    return C({\n"
        "        # Of all.\n        'run': {\n            'n': 1,  # how many\n"
        "            # Above,\n            # twice.\n            'm': 2,\n"
        "            'bare': 3,\n        },\n    })\n"
        "def stage():\n    return f({'k': (),  # beside\n    **own}, fields)\n"
    )
    assert fields.described_keys(code, "run") == [
        (("n",), ("1",), "how many"),
        (("m",), ("2",), "Above, twice."),
        (("bare",), ("3",), ""),
    ]
    assert fields.described_keys(code, "stage") == [(("k",), ("()",), "beside")]


def test_a_table_has_defaults_and_ranges():
    rows = fields.table("stage").splitlines()
    rate = next(row for row in rows if row.startswith("| `learning_rate`"))
    assert "| `0.0002` |" in rate and rate.endswith("(from 0 to 10) |")
    assert "train \\| gate" in "".join(rows)
    widths = next(row for row in fields.table("decoder").splitlines() if "`d_model`" in row)
    assert "| must be given |" in widths
