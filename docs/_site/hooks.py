"""What MkDocs does beyond docs/: navigation and llms.txt from docs/index.md, pages beside docs/.

The repository is read as files too, so every link is relative to the repository. The site takes
the pages beside ``docs/`` (examples, changelog, ...) in, and links to them are changed here.
"""

import posixpath
import re
import tomllib
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
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "examples/**/*.md",
    "examples/**/*.py",
    "migrations_example/**/*.md",
    "migrations_example/**/*.py",
    "migrations_example/**/*.ini",
    "migrations_example/**/*.mako",
)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)[^)\s#]+")
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Source"]
HEADING_OR_ROW = re.compile(
    r"^## (?P<section>.+)$|^\| \[(?P<title>.+?)\]\((?P<page>[^)#]+)\) \| (?P<answers>.+) \|$",
    re.MULTILINE,
)
FIRST_PAGE = ROOT / "docs" / "index.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation from the tables of the guide's first page."""
    sections = [
        {name: [{row["title"].strip("`"): place("docs", row["page"])} for row in rows]}
        for name, rows in contents().items()
    ]
    config.nav = [{"Overview": "index.md"}, *sections]
    return config


def contents() -> dict[str, list[re.Match[str]]]:
    """Return the rows that lead to pages, by section."""
    sections: dict[str, list[re.Match[str]]] = {}
    for found in HEADING_OR_ROW.finditer(FIRST_PAGE.read_text("utf-8")):
        if found["section"]:
            rows = sections[found["section"]] = []
        else:
            rows.append(found)
    return {name: rows for name, rows in sections.items() if rows}


def llms_txt(config: MkDocsConfig) -> str:
    """List the pages for language models, as llmstxt.org describes it."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for name, rows in contents().items():
        lines += ["", f"## {name}", ""]
        for row in rows:
            page = place("docs", row["page"]).removesuffix("README.md").removesuffix(".md")
            lines.append(f"- [{row['title'].strip('`')}]({page}/): {row['answers']}")
    return "\n".join(lines).replace("//)", "/)") + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages beside docs/, under the paths that they have in the repository."""
    for path in sorted({path for glob in BESIDE for path in ROOT.glob(glob)}):
        name = place("", path.relative_to(ROOT).as_posix())
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "llms.txt", content=llms_txt(config)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links that hold in the repository into links that hold on the site.

    What the site does not have, such as the package's code, is shown where its source is.
    """
    source = page.file.src_uri
    folder = posixpath.dirname(source if page.file.generated_by else f"docs/{source}")

    def on_this_page(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[0]))
        if not (ROOT / path).exists():
            return link[0]  # code that looks like a link
        if files.get_file_from_path(place(folder, link[0])) is None:
            return f"{SOURCE}/blob/main/{path}"
        return posixpath.relpath(place(folder, link[0]), posixpath.dirname(source) or ".")

    return LINK.sub(on_this_page, markdown)


def place(folder: str, link: str) -> str:
    """Return where the site has what a link from a folder of the repository leads to."""
    path = posixpath.normpath(posixpath.join(folder, link))
    # MkDocs takes a README.md for the index of its folder; the site's is docs/index.md.
    return "about.md" if path == "README.md" else path.removeprefix("docs/")
