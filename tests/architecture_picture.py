"""The picture docs/architecture.svg, drawn from the order in tests/test_architecture.py.

`python -m tests.architecture_picture` rewrites it. A test checks that it is up to date.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from tests.test_architecture import ORDER

PICTURE = Path(__file__).parents[1] / "docs" / "architecture.svg"
WIDTH, MARGIN, GAP, LINE, LETTER = 960, 16, 10, 18, 7.2
ROLES = {
    "exceptions": "what can go wrong",
    "_drivers": "drivers, dialects and pools",
    "errors": "database errors over HTTP",
    "_sessions": "the engine room",
    "databases": "the handles",
    "_lifespan": "install, start, check, stop",
    "_unit_of_work": "one request",
    "dependencies": "get_db, transactional, reader",
    "health": "live and ready",
    "telemetry": "metrics of pools",
    "migrations": "Alembic's heads",
    "checklist": "asks the servers",
    "testing": "for people who test applications",
}
STYLE = """\
text { font: 12px ui-monospace, monospace; fill: #1f2328 }
.name { font-weight: bold } .role { fill: #59636e }
.paper { fill: #ffffff } .box { fill: #f6f8fa; stroke: #59636e }"""

Band = dict[str, list[str]]


def bands(order: Sequence[set[str]]) -> list[Band]:
    """Merge consecutive rows of the same package, and return the bands from the lowest up."""
    found: list[Band] = []
    for row in order:
        fresh: Band = {}
        for module in sorted(row):
            package, dot, name = module.rpartition(".")
            box, part = (package, name) if dot else (_face(module), "")
            last = found[-1] if found else {}
            (last if dot and box in last else fresh).setdefault(box, []).append(part)
        if fresh:
            found.append(fresh)
    return found


def _face(module: str) -> str:
    return {"__init__": "fastapi_sqlnative", "__main__": "python -m"}.get(module, module)


def wrapped(parts: list[str], room: float) -> Iterator[str]:
    """Break a list of modules into lines that fit into `room` pixels."""
    line = ""
    for part in filter(lambda each: each and each != "__init__", parts):
        longer = f"{line}, {part}" if line else part
        if line and len(longer) * LETTER > room:
            yield f"{line},"
            longer = part
        line = longer
    if line:
        yield line


def draw(order: Sequence[set[str]]) -> str:
    """Return the picture, in which a module may import the modules below it."""
    shapes: list[str] = []
    y = MARGIN
    for band in reversed(bands(order)):
        width = (WIDTH - 2 * MARGIN - GAP * (len(band) - 1)) / len(band)
        texts = {name: list(wrapped(parts, width - 20)) for name, parts in band.items()}
        roles = {name: ROLES.get(name, "") for name in band}
        lines = max(len(texts[name]) + bool(roles[name]) for name in band)
        height = (lines + 1) * LINE + 12
        for place, name in enumerate(band):
            x = MARGIN + place * (width + GAP)
            shapes.append(_box(x, y, width, height))
            shapes.append(_text(x, y + LINE, "name", name))
            if roles[name]:
                shapes.append(_text(x, y + 2 * LINE, "role", roles[name]))
            shapes += [
                _text(x, y + (number + 2 + bool(roles[name])) * LINE, "", line)
                for number, line in enumerate(texts[name])
            ]
        y += height + GAP
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            "<title>Modules, each above those that it may import</title>",
            f"<style>{STYLE}</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _box(x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}"'
        ' rx="6"/>'
    )


def _text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text class="{kind}" x="{x + 10:.0f}" y="{y:.0f}">{escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(ORDER), "utf-8")
