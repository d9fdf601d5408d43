"""Pictures of what runs have logged: their numbers are those of the records."""

import json
import re

import numpy as np
import pytest

from medmoe_jax.checkpoints.files import read_metrics
from medmoe_jax.cli.main import main
from medmoe_jax.errors import UserError
from medmoe_jax.evaluation import charts, html
from medmoe_jax.evaluation.logged import Logged, pictures, read_logged
from tests import tiny


def rows(steps, **more):
    """Rows of a log, a step each."""
    return [{"step": step, "loss": 1.0 / step, "tokens": 9.0, **more} for step in range(1, steps)]


def write(folder, stage, log):
    path = folder / "stages" / stage / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    return str(folder)


def drawn(picture):
    """`{label: (x, y)}` of the lines of a picture's figure."""
    (axes,) = picture.figure().axes
    return {line.get_label(): line.get_data() for line in axes.lines}


def numbers(text):
    """What a page holds for its script."""
    return [json.loads(one) for one in re.findall(r'application/json">(.*?)</script>', text)]


def test_a_run_as_its_records_say():
    """Every figure of both stages of the tiny recipe, in the recipe's order."""
    workdir = tiny.trained()[1]
    found = dict(pictures(read_logged([str(workdir)])))
    assert list(found)[:2] == ["aggregate.loss", "aggregate.gradient_norm"] or "loss" in found
    logs = {
        s: read_metrics(workdir / "stages" / s / "metrics.jsonl") for s in ("aggregate", "align")
    }
    for stage, log in logs.items():
        x, y = drawn(found[f"{stage}.loss"])["loss"]
        assert list(x) == [row["step"] for row in log] and list(y) == [row["loss"] for row in log]
    losses = [row["loss"] for log in logs.values() for row in log]
    panels = [found[f"{stage}.loss"] for stage in logs]
    assert len({one.figure().axes[0].get_ylim() for one in panels}) == 1  # equal scales
    # A page has six digits of a number.
    span = pytest.approx([min(losses), max(losses)], rel=1e-5)
    assert all(one.data()["span"] == span for one in panels)
    x, y = drawn(found["align.overlap_cos"])["alignment-knowledge"]
    known = [row for row in logs["align"] if "overlap/alignment-knowledge/cos" in row]
    assert list(x) == [row["step"] for row in known] and len(known) > 3
    assert list(y) == [row["overlap/alignment-knowledge/cos"] for row in known]
    assert set(drawn(found["aggregate.router_entropy"])) == {
        f"noise/mlp.{part}" for part in ("gate", "up", "down")
    }
    use = found["aggregate.use.noise_mlp.up"]
    routed = [row for row in logs["aggregate"] if row.get("router")]
    assert list(use.matrices) == [f"step {row['step']}" for row in routed]
    panels = use.figure().axes[:4]
    assert [axes.get_title() for axes in panels] == ["step 2", "step 6", "step 8", "step 12"]
    assert np.array_equal(
        panels[-1].collections[0].get_array(), routed[-1]["router"]["noise/mlp.up"]["use"]
    )
    (data,) = [one for one in numbers(html.page_html([use], "p", live=True))]
    assert np.allclose(data["moments"][0]["values"], use.matrices["step 2"], rtol=1e-5)


def test_scores_and_ranks():
    score = {"score": 0.5, "low": 0.4, "high": 0.7}
    ranks = {"bank": {"mlp.up": [[2, 4], [1, 1]], "mlp.down": [[0, 0], [3, 1]]}}
    done = {"evaluation": {"exam": score, "other": {**score, "score": 0.6}}, "ranks": ranks}
    logged = [Logged("w", "one", rows(3), {}), Logged("w", "two", rows(3), done)]
    logged.append(Logged("w", "three", [], {"evaluation": {"exam": {**score, "score": 0.45}}}))
    found = dict(pictures(logged))
    scores = found["scores"]
    assert scores.labels == ["two", "three"]
    assert dict(scores.series)["exam"] == [(0.5, 0.4, 0.7), (0.45, 0.4, 0.7)]
    (axes,) = scores.figure().axes
    exam, other = axes.containers
    assert list(exam[0].get_ydata()) == [0.5, 0.45] and list(other[0].get_xdata()) == [0]
    (spans,) = exam[2]
    assert np.allclose(spans.get_segments()[0], [[0, 0.4], [0, 0.7]])
    (data,) = numbers(html.page_html([scores], "p", live=True))
    one, two = data["series"]
    assert (one["y"], one["low"], one["high"]) == ([0.5, 0.45], [0.4, 0.4], [0.7, 0.7])
    assert two["x"] == [0] and data["labels"] == ["two", "three"]
    heat = found["two.ranks.bank"]
    assert heat.matrix == [[3.0, 1.0], [0.0, 2.0]] and heat.rows == ["mlp.up", "mlp.down"]


def test_several_runs_are_drawn_together(tmp_path, capsys):
    """By their names; a figure that one alone has is there too."""
    log = rows(4, **{"eval/mmlu/x": 0.25, "allocation/b/kept": 7, "note": "no number"})
    runs = [write(tmp_path / "a", "s", rows(3)), write(tmp_path / "b", "s", log)]
    found = dict(pictures(read_logged(runs)))
    assert set(found) == {"s.loss", "s.eval", "s.allocation_kept"}
    assert {name: list(y) for name, (_, y) in drawn(found["s.loss"]).items()} == {
        runs[0]: [1.0, 0.5], runs[1]: [1.0, 0.5, 1 / 3],
    }  # fmt: skip
    assert list(drawn(found["s.eval"])) == [f"{runs[1]}: mmlu/x"]
    out = tmp_path / "out"
    assert main(["plot", *runs]) == 1
    assert "--output is missing" in capsys.readouterr().err
    assert main(["plot", *runs, f"--output={out}"]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {*(f"{n}.png" for n in found), "plots.html"}
    assert (out / "s.loss.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_whose_files_would_have_one_name_are_all_kept(tmp_path, monkeypatch, capsys):
    """Runs, routers and banks; large and small letters too, which are one to some disks."""
    monkeypatch.chdir(tmp_path)
    use = {"use": [[0.25, 0.75]]}
    routers = ("b/x/y", "b/x_y", "B/X_y")
    log = rows(3, router=dict.fromkeys(routers, use))
    for folder in ("runs/a", "runs_a"):
        write(tmp_path / folder, "s", log)
    runs = ("runs/a", "runs_a")
    logged = read_logged(runs)
    ranks = {name: {"mlp.up": [[2, 4]]} for name in ("n/m", "n_m")}
    logged = [one._replace(figures={"ranks": ranks}) for one in logged]
    found = list(pictures(logged))
    names = [name.casefold() for name, _ in found]
    assert len(set(names)) == len(names) == 1 + len(runs) * (len(routers) + len(ranks))
    titles = {picture.title for _, picture in found}
    uses = {f"{run}, s: use of the experts of {one}" for run in runs for one in routers}
    assert titles == uses | {f"{run}, s: ranks of {one}" for run in runs for one in ranks} | {
        "s: loss"
    }
    assert names[1:3] == ["runs_a_s.use.b_x_y", "runs_a_s.use.b_x_y.2"]
    assert main(["plot", *runs, "--output=out"]) == 0
    page = (tmp_path / "out" / "plots.html").read_text()
    assert all(f"<h2>{title}</h2>" in page for title in uses)
    assert len(list((tmp_path / "out").glob("*.png"))) == 1 + len(uses)


def test_what_cannot_be_drawn(tmp_path):
    (tmp_path / "empty" / "stages" / "s").mkdir(parents=True)
    bad = rows(2, router={"b/mlp.up": {"use": [[0.5, 0.5], [1.0]]}})
    for given, words in (
        ([], "no work directory is named"),
        ([str(tmp_path)], "is no work directory: there is no folder 'stages'"),
        ([str(tmp_path / "empty")], "nothing is logged there yet; train first"),
        ([write(tmp_path / "a", "s", rows(2))] * 2, "a work directory is named twice"),
        ([write(tmp_path / "b", "s", bad)], "step 1: the router 'b/mlp.up' has no table `use`"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            dict(pictures(read_logged(given)))


def test_a_page_is_live_only_where_it_is_asked_to_be():
    """A name can neither end the block of numbers nor be read as mathematics or markup."""
    name = "</script><script>alert(1)</script>$x$"
    section = html.LinesSection(f"{name}", [(name, [1, 2], [np.nan, 2.0])])
    still = html.page_html([section], "p")
    assert "<script" not in still and "$x$" in still
    live = html.page_html([section], "p", {"Other <page>": "a&b.html"}, live=True)
    assert live.count("<script") == 2 and "alert(1)</script>" not in live
    assert '<a href="a&amp;b.html">Other &lt;page&gt;</a>' in live
    (data,) = numbers(live)
    assert data["series"][0]["name"] == name and data["series"][0]["y"] == [None, 2.0]


def test_sections_that_begin_alike_share_a_link():
    titles = ("Scores", "one: loss", "one: norm: of all", "two: loss")
    page = html.page_html([html.TextSection(title, "text") for title in titles], "p")
    links = re.findall(r'<a href="#(s\d)">(.*?)</a>', page)
    assert links == [("s1", "Scores"), ("s2", "one"), ("s4", "two")]
    assert re.findall(r'<section id="(s\d)"><h2>(.*?)</h2>', page) == [
        (f"s{n}", title) for n, title in enumerate(titles, 1)
    ]


def test_a_long_line_is_thinned_by_means():
    values = np.random.default_rng(0).normal(size=2500)
    (one,) = charts.lines([("a", range(1, 2501), values)], "step", "loss")["series"]
    assert len(one["x"]) == len(one["y"]) == 834 and one["x"][:2] == [3, 6] and one["x"][-1] == 2500
    assert np.allclose(one["y"][:833], values[:2499].reshape(833, 3).mean(1), rtol=1e-5)
    assert one["y"][-1] == pytest.approx(values[-1], rel=1e-5)
    assert charts.spread("abcdefg", 3) == ["a", "d", "g"] and charts.spread("ab", 3) == ["a", "b"]
