"""A hook of MkDocs: pages from outside of docs/, links that mean the same on every host, tables.

Pages link each other by their paths in the repository, so that they can be read where it is hosted.
On the site a link to a page leads to that page, and one to any other file to the repository, whose
address is `repo_url` in mkdocs.yml; without one, its words stay as plain text. A comment of the
form `<!-- fields: NAME -->` becomes a table of `fields.SECTIONS`.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs knows this folder alone, and mends the path afterwards
from docs.making import fields  # noqa: E402

# Pages of the site that do not lie in docs/, by their path in the repository.
OUTSIDE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "launch/README.md": "pods.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_SOURCES = {page: source for source, page in OUTSIDE.items()}
_FIELDS = re.compile(r"<!-- fields: (\w+) -->")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in a page's tables, and lead its links to where the site has what they name."""
    markdown = _FIELDS.sub(lambda comment: fields.table(comment[1]), markdown)
    return relinked(markdown, page.file.src_uri, config.repo_url or "", set(files.src_uris))


def relinked(markdown: str, page: str, repository: str, pages: set[str]) -> str:
    """A page's text with its links as the site needs them.

    Args:
      markdown: the text, whose links are relative to its file in the repository.
      page: the page's path on the site.
      repository: the repository's address, or nothing.
      pages: paths of all that the site has.
    """
    folder = posixpath.dirname(_SOURCES.get(page, f"docs/{page}"))

    def lead(link: re.Match[str]) -> str:
        sign, words, target = link.groups()
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path)) if path else ""
        # What is no file of ours is left to MkDocs, which warns unless it is an address.
        if not path or not (ROOT / path).exists():
            return link[0]
        place = OUTSIDE.get(path, path.removeprefix("docs/"))
        if place in pages:
            path = posixpath.relpath(place, posixpath.dirname(page) or ".")
        elif repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            path = f"{repository.rstrip('/')}/{kind}/HEAD/{path}"
        else:
            return words
        return f"{sign}[{words}]({path}{hash_sign}{anchor})"

    return _LINK.sub(lead, markdown)
