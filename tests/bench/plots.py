"""Bars with whiskers, as SVG text: no library, and a diff that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

#: By product; whoever is not here is grey.
COLOURS: Final = {"rtunnel": "#1f6feb", "frp": "#bf8700", "HAProxy x2": "#57606a", "none": "#afb8c1"}
OTHERS: Final = "#8c959f"

_LABELS: Final = 210
_WIDTH: Final = 760
_ROW: Final = 22
_TOP: Final = 46


@dataclass(frozen=True)
class Bar:
    """One system: median, least, most, and what stands behind the bar."""

    label: str
    product: str
    value: float
    low: float
    high: float


def bars(title: str, unit: str, better: str, rows: Sequence[Bar]) -> str:
    """A chart of horizontal bars that begin at zero."""
    height = _TOP + _ROW * len(rows) + 12
    most = max((bar.high for bar in rows), default=1.0) or 1.0
    scale = (_WIDTH - _LABELS - 90) / most
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="14" font-weight="600" fill="#1f2328">{escape(title)}</text>',
        f'<text x="12" y="36" fill="#57606a">{escape(unit)}; {escape(better)}; bar: median, line: least to most</text>',
    ]
    for number, bar in enumerate(rows):
        lines += _bar(bar, _TOP + _ROW * number, scale)
    return "\n".join([*lines, "</svg>", ""])


def _bar(bar: Bar, top: int, scale: float) -> list[str]:
    middle, width = top + _ROW / 2, max(1.0, bar.value * scale)
    low, high = (_LABELS + edge * scale for edge in (bar.low, bar.high))
    end, base = max(high, _LABELS + width) + 6, f"{middle + 4:.0f}"
    return [
        f'<text x="{_LABELS - 8}" y="{base}" text-anchor="end" fill="#1f2328">{escape(bar.label)}</text>',
        f'<rect x="{_LABELS}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}"'
        f' fill="{COLOURS.get(bar.product, OTHERS)}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#1f2328"/>',
        f'<text x="{end:.1f}" y="{base}" fill="#1f2328">{number(bar.value)}</text>',
    ]


def number(value: float) -> str:
    """About three significant digits, no exponent."""
    for least, digits in ((100, 0), (10, 1), (0.1, 2), (1e-9, 3)):
        if abs(value) >= least:
            return f"{value:.{digits}f}"
    return "0"
