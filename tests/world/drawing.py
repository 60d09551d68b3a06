"""The few shapes of SVG that a picture is made of."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Return the picture that holds ``parts``, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, rect(0, 0, width, height, "white"), *parts, "</svg>"]) + "\n"


def rect(x: float, y: float, width: float, height: float, fill: str, title: str = "") -> str:
    """Return a filled rectangle; ``title`` shows where the pointer is on it."""
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.3):.1f}" height="{height:.1f}" '
        f'fill="{fill}" stroke="white" stroke-width="0.5">{told}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, color: str, dash: str = "none") -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
        f'stroke-width="1.5" stroke-dasharray="{dash}"/>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13) -> str:
    """Return words that begin, or by ``anchor`` end or have their middle, at ``x``."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(words)}</text>"
    )
