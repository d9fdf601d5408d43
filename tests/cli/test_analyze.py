"""`medmoe analyze routing` through `main([...])`, on the tiny recipe and its own data."""

import json

import pytest

from medmoe_jax.cli.main import main
from tests import tiny


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The config and work directory of the tiny recipe, both stages finished."""
    file = tmp_path_factory.mktemp("config") / "recipe.py"
    file.write_text("from tests import tiny\n\n\nget_config = tiny.medcare_config\n")
    return ["analyze", "routing", f"--config={file}", f"--workdir={tiny.trained()[1]}"]


def test_routing_of_every_language(arguments, tmp_path, capsys):
    rows = [{**row, "language": ("en", "de")[n % 2]} for n, row in enumerate(tiny.alignment_rows())]
    file, out = tiny.write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    command = [*arguments, "--stage=aggregate", f"--data={file}", "--data=knowledge", "--limit=12"]
    assert main([*command, f"--out={out}"]) == 0
    printed = capsys.readouterr()
    assert f"written to {out / 'routing.html'}" in printed.out and "noise/mlp.gate" in printed.err
    figures = json.loads((out / "routing.json").read_text())
    # The rows of `knowledge` name no language; they are English.
    assert {name: one["rows"] for name, one in figures["languages"].items()} == {"de": 8, "en": 12}
    assert set(figures["gates"]) == {f"noise/mlp.{site}" for site in ("gate", "up", "down")}
    for gate in figures["gates"].values():
        for share in (layer for layers in gate["share"].values() for layer in layers):
            assert sum(share) == pytest.approx(1, abs=1e-5) and len(share) == 4
    assert (out / "share.noise.mlp.gate.png").is_file()


REFUSED = {
    "no_router": (["--data=knowledge"], "no bank that takes part has a router"),
    "off": (["--stage=aggregate", "--off=noise", "--data=knowledge"], "(banks: attention, knowl"),
    "data": (["--data=nowhere"], "'nowhere' is no file and no source of the config (alignment, "),
    "limit": (["--data=knowledge", "--limit=0"], "--limit: 0 is below 1"),
    "stage": (["--data=knowledge", "--stage=algin"], "--stage: 'algin' is none of base, agg"),
    "bare": (["--data=knowledge", "--stage=base"], "(banks: none)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, arguments, tmp_path, capsys):
    more, message = REFUSED[name]
    assert main([*arguments, *more, f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert "medmoe analyze: error: " in error and message in error
    assert not (tmp_path / "out").exists()
