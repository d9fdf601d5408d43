"""The site of the documentation: it builds without a warning, and its links lead somewhere."""

import logging
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from docs.making import figures, hook

ROOT = Path(__file__).parents[2]


def make(folder: Path, **settings) -> None:
    """Build the site of this checkout, or of the one that `settings` names, in a folder."""
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True, **settings)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; all tests look into the same one."""
    folder = tmp_path_factory.mktemp("site")
    make(folder)
    return folder


@pytest.mark.slow
def test_every_page_is_there(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for source in (ROOT / "docs").rglob("*.md"):
        name = source.relative_to(ROOT / "docs").with_suffix("")
        assert f"{name}/index.html" in pages, name
    for page in hook.OUTSIDE.values():
        assert page == "index.md" or page.replace(".md", "/index.html") in pages, page
    assert not list(site.rglob("*.py"))


def test_nothing_is_asked_of_other_servers(site):
    """But for mermaid.js, which the theme fetches to draw the page on the architecture."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', text), page


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, caplog):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[a](no.md) [b](#nowhere) [c](other.md#there)\n")
    (docs / "other.md").write_text("# Here\n")
    settings = {"docs_dir": str(docs), "nav": ["index.md", "other.md"], "hooks": [], "plugins": []}
    with caplog.at_level(logging.INFO, "mkdocs"), pytest.raises(Abort):
        make(tmp_path / "site", **settings)
    for target in ("no.md", "#nowhere", "other.md#there"):
        assert f"'{target}'" in caplog.text


@pytest.mark.parametrize(
    "page, link, address, wanted",
    [
        ("data.md", "[t](tasks.md#the-sets)", "", "[t](tasks.md#the-sets)"),
        ("index.md", "[d](docs/data.md#templates)", "", "[d](data.md#templates)"),
        ("index.md", "![p](docs/site.css)", "", "![p](site.css)"),
        ("data.md", "[h](../README.md#tests)", "", "[h](index.md#tests)"),
        ("methods/x.md", "[l](../../launch/README.md)", "", "[l](../pods.md)"),
        ("pods.md", "[s](tpu_run.sh)", "", "s"),
        ("pods.md", "[s](tpu_run.sh)", "https://h/o/r/", "[s](https://h/o/r/blob/HEAD/launch/tpu_run.sh)"),
        ("index.md", "[`c`](configs)", "https://h/o/r", "[`c`](https://h/o/r/tree/HEAD/configs)"),
        ("index.md", "[n](nothing.md) [m](#m) [w](https://w.org)", "x",
         "[n](nothing.md) [m](#m) [w](https://w.org)"),
    ],
)  # fmt: skip
def test_links_lead_to_pages_or_to_the_repository(page, link, address, wanted):
    pages = {"data.md", "tasks.md", "index.md", "pods.md", "site.css"}
    assert hook.relinked(link, page, address, pages) == wanted


def test_the_figures_are_those_of_the_recipes():
    """`python -m docs.making.figures` draws them anew."""
    drawn = figures.figures()
    assert {path.stem for path in figures.FOLDER.glob("*.svg")} == set(drawn)
    for name, drawing in drawn.items():
        assert (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawing.svg(), name
        assert len(drawing.svg()) < 100_000
