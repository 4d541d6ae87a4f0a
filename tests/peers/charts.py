"""Bar charts as SVG: one panel for each column of a table, one bar for each contestant."""

from collections.abc import Mapping, Sequence
from html import escape

from tests.peers.results import Spread

LINE, PANEL, LABELS, TOP = 22, 230, 230, 44
MOST = 2.2  # longer bars are cut off, and the number beside them shows the ratio
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600 }
.ours { fill: #0b7a75 } .hand { fill: #8a8f98 } .other { fill: #c4c8ce }
line { stroke: #333 } .base { stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } line { stroke: #ddd } .other { fill: #5b6068 } .ours { fill: #35b8b0 } }
"""


def bar_chart(
    title: str, panels: Mapping[str, Mapping[str, Spread]], kinds: Mapping[str, str]
) -> str:
    """Draw ratios, with a whisker from the first quartile to the third.

    Args:
        title: what is compared.
        panels: the ratio of each contestant, by column.
        kinds: the contestants from top to bottom, each `ours`, `hand` or `other`.
    """
    names = [name for name in kinds if any(name in ratios for ratios in panels.values())]
    height = TOP + LINE * len(names) + 8
    width = LABELS + PANEL * len(panels)
    parts = [_text(0, 14, title, "title")]
    for place, name in enumerate(names):
        parts.append(_text(0, TOP + LINE * place + 15, name))
    for place, (column, ratios) in enumerate(panels.items()):
        left = LABELS + PANEL * place
        parts.append(_text(left, 36, column))
        bars = [(kinds[name], ratios.get(name)) for name in names]
        parts += _panel(left, bars, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(left: int, bars: Sequence[tuple[str, Spread | None]], height: int) -> list[str]:
    unit = (PANEL - 50) / MOST
    one = left + unit
    parts = [f'<line class="base" x1="{one:.1f}" x2="{one:.1f}" y1="42" y2="{height}"/>']
    for place, (kind, ratio) in enumerate(bars):
        if ratio is None:
            continue
        y = TOP + LINE * place + 4
        low, median, high = (left + unit * min(each, MOST) for each in ratio)
        size = f'width="{median - left:.1f}" height="14"'
        parts.append(f'<rect class="{kind}" x="{left}" y="{y}" {size}/>')
        parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 7}" y2="{y + 7}"/>')
        parts.append(_text(max(median, high) + 4, y + 11, f"{ratio.median:.2f}"))
    return parts


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y}">{escape(text.replace("`", ""))}</text>'
