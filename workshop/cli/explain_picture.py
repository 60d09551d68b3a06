"""Draws which experts the tokens of a text go to; needs matplotlib (``expertmesh[plots]``)."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from router.cli.common import printable
from workshop.cli.explained import Explained

MOST_NAMED = 160
"""The most tokens that have their texts under the picture."""
_DPI = 120
_DISTINCT = 20


def draw(explained: Explained, path: Path) -> None:
    """Write a picture: each token's first expert in each layer, and the experts' shares by layer.

    The format is that of the file's name. Raises ``OSError`` for a file that cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, num_experts = explained.info.moe_layers, explained.info.num_experts
    first = np.array([explained.first_experts(place) for place in range(len(layers))], dtype=float)
    num_tokens = len(explained.tokens)
    width = min(max(5.0, 1.0 + 0.16 * num_tokens), 40.0)
    height = 1.6 + 0.26 * len(layers)
    figure = Figure(figsize=(width + 4.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, shares = figure.subplots(1, 2, sharey=True, width_ratios=(width, 4.0))
    name = "tab20" if num_experts <= _DISTINCT else "turbo"
    colours = matplotlib.colormaps[name].resampled(num_experts)
    image = tokens.imshow(
        first, aspect="auto", cmap=colours, vmin=-0.5, vmax=num_experts - 0.5, interpolation="none"
    )
    tokens.set_title(f"{explained.info.id}: the first expert of each token", fontsize=10)
    tokens.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers], fontsize=8)
    if num_tokens <= MOST_NAMED:
        texts = [_label(token.text) for token in explained.tokens]
        tokens.set_xticks(range(num_tokens), texts, rotation=90, fontsize=7, family="monospace")
    if explained.num_prompt < num_tokens:
        tokens.axvline(explained.num_prompt - 0.5, color="black", linewidth=2)
    ticks = None if num_experts > _DISTINCT else range(num_experts)
    figure.colorbar(image, ax=tokens, label="expert", fraction=0.03, pad=0.01, ticks=ticks)
    heat = shares.imshow(
        100 * explained.shares, aspect="auto", cmap="Greys", vmin=0, interpolation="none"
    )
    per_token = explained.info.num_experts_per_tok
    shares.set_title(f"shares of all {per_token} experts of a token", fontsize=10)
    shares.set_xlabel("expert", fontsize=8)
    label = f"%; even is {100 / num_experts:.1f}"
    figure.colorbar(heat, ax=shares, label=label, fraction=0.06, pad=0.02)
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(path, dpi=_DPI, metadata=_metadata(path))


def _metadata(path: Path) -> dict[str, None]:
    """Return what leaves times and versions out of a file."""
    return {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}


def _label(text: str) -> str:
    """Return a token's text with visible spaces; a dollar sign begins no formula."""
    shown = text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣")
    return printable(shown).replace("$", r"\$")
