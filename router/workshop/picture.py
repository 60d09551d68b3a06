"""Draws which tokens each expert takes; needs matplotlib (`expertmesh[plots]`)."""

import importlib.util
from pathlib import Path

from router.workshop.report import Figures

PICTURE_FILE = "experts.png"
_DPI = 80


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_experts(figures: Figures, path: Path) -> None:
    """Write a PNG: a row per kind of token and per text, a column per layer and expert.

    The colour of a cell is the expert's share of the row's assignments in the layer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [*figures.kind_shares, *figures.source_shares]
    rows = [*figures.kind_shares.values(), *figures.source_shares.values()]
    num_layers, num_experts = len(figures.expert_shares), len(figures.expert_shares[0])
    figure = Figure(figsize=(2.2 + 0.3 * num_layers * num_experts, 1.2 + 0.3 * len(rows)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_layers, sharey=True, squeeze=False)[0]
    largest = max(share for row in rows for layer in row for share in layer)
    for layer_id, axis in enumerate(axes):
        image = axis.imshow(
            [[100 * share for share in row[layer_id]] for row in rows],
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=100 * largest,
        )
        axis.set_title(f"layer {layer_id}", fontsize=10)
        axis.set_xticks(range(num_experts))
        axis.set_yticks(range(len(names)), names)
        # Kinds of token above, texts below.
        axis.axhline(len(figures.kind_shares) - 0.5, color="white", linewidth=2)
    axes[0].set_xlabel("expert")
    label = f"% of the row's assignments; even is {100 / num_experts:.1f}"
    figure.colorbar(image, ax=list(axes), label=label, fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
