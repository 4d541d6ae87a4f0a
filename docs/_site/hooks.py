"""What MkDocs does beyond docs/: the navigation of docs/index.md, and the pages beside docs/.

The repository is read as files too, so every link is relative to the repository. The site takes
the pages beside ``docs/`` (examples, changelog, ...) in, and links to them are turned here.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Globs of what readers are sent to from a page: documents, and the code that they talk about.
BESIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "examples/**/*.md",
    "examples/**/*.py",
    "migrations_example/**/*.md",
    "migrations_example/**/*.py",
    "migrations_example/**/*.ini",
    "migrations_example/**/*.mako",
)
# Only these lead out of a page's own folder; the others are the same on the site.
LINK = re.compile(r"(?<=\]\()(?:\.\./|docs/)[^)\s#]+")
HEADING_OR_LINK = re.compile(
    r"^## (?P<section>.+)$|^\| \[(?P<title>.+?)\]\((?P<page>[^)#]+)\)", re.M
)
HOME = "docs/index.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation from the tables of the guide's first page."""
    sections: list[dict[str, list[dict[str, str]]]] = []
    for found in HEADING_OR_LINK.finditer((ROOT / HOME).read_text("utf-8")):
        if found["section"]:
            pages: list[dict[str, str]] = []
            sections.append({found["section"]: pages})
        else:
            pages.append({found["title"].strip("`"): place("docs", found["page"])})
    config.nav = [{"Overview": "index.md"}, *(each for each in sections if [*each.values()][0])]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, under the paths that they have in the repository."""
    for path in sorted({path for glob in BESIDE for path in ROOT.glob(glob)}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    source = page.file.src_uri
    folder = posixpath.dirname(source if page.file.generated_by else f"docs/{source}")

    def turn(link: re.Match[str]) -> str:
        return posixpath.relpath(place(folder, link[0]), posixpath.dirname(source) or ".")

    return LINK.sub(turn, markdown)


def place(folder: str, link: str) -> str:
    """Return where the site has what a link from a folder of the repository leads to."""
    return posixpath.normpath(posixpath.join(folder, link)).removeprefix("docs/")
