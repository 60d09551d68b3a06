"""Pictures of which expert takes which rows; needs matplotlib (``expertmesh[plots]``).

Dimension letters: N rows, E experts, F features, W values of an expert's output, P grid points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workshop.estimators.parts import Array, FittedMixture, Rows
from workshop.estimators.sequences import Sequences

CURVE_POINTS = 401
GRID_POINTS = 201
"""The points along an axis of a curve, and of a plane."""
_MARGIN = 0.05
_MAX_NAMED = 20
"""The most experts that a legend names."""
_FAINTEST = 0.12


def plot_experts(
    mixture: FittedMixture,
    X: Rows,
    names: Sequence[str] | None = None,
    ax: Any = None,
    features: tuple[int | str, int | str] | None = None,
) -> Any:
    """Draw which expert takes which of the rows X [N, *row shape]; returns matplotlib's axes.

    - One feature: the gate's weights as areas, and each expert's prediction, the fainter the less
      the gate trusts it. Of several outputs it is the first, of classes the last one's probability.
    - Two features: the plane in the experts' colours, mixed by the gate's weights, and the rows.
    - More: the rows in these colours, by two ``features`` (numbers or ``names``) or, by default, by
      their two principal components. Of sequences of several lengths the steps' means stand for a
      row.

    ``ax`` are the axes to draw on, by default new ones. Raises ``ImportError`` without matplotlib,
    and ``ValueError`` for a feature that does not exist.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot_experts needs matplotlib, which is not installed; pip install 'expertmesh[plots]'"
        ) from error
    chosen = _chosen(features, X, names)
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    colours = _colours(len(mixture.experts))
    flat = _flat(X)
    labels = [_name(feature, names) for feature in chosen or (0, 1)[: flat.shape[1]]]
    if X.ndim == 2 and X.shape[1] == 1:
        _draw_curves(ax, mixture, flat[:, 0], colours)
    elif X.ndim == 2 and X.shape[1] == 2:
        _draw_plane(ax, mixture, flat, colours)
    else:
        if chosen is None:
            labels = ["first principal component", "second principal component"]
        places = _components(flat) if chosen is None else flat[:, chosen]
        ax.scatter(*places.T, s=14, c=_mixed(mixture, X, colours), linewidths=0)
    for set_label, label in zip((ax.set_xlabel, ax.set_ylabel), labels, strict=False):
        set_label(label)
    _name_experts(ax, mixture, colours)
    return ax


def _flat(X: Rows) -> Array:
    """Return a vector for each row: its values, or the mean of an unequal sequence's steps."""
    if isinstance(X, Sequences):
        return X.by_length(lambda rows: rows.mean(axis=1))
    return X.reshape(len(X), -1)


def _chosen(
    features: tuple[int | str, int | str] | None, X: Rows, names: Sequence[str] | None
) -> list[int] | None:
    if features is None:
        return None
    if X.ndim != 2 or X.shape[1] < 3 or len(features) != 2:
        raise ValueError("features: two of them, for rows of more than two features")
    known = range(X.shape[1])
    places = []
    for feature in features:
        place = feature
        if isinstance(feature, str) and names is not None and feature in names:
            place = names.index(feature)
        if place not in known:
            raise ValueError(f"features: {feature!r} is none of the {len(known)} features")
        places.append(int(place))
    return places


def _name(feature: int, names: Sequence[str] | None) -> str:
    return f"feature {feature}" if names is None else names[feature]


def _colours(count: int) -> Array:
    """Return a colour [3] for each expert, easily told apart up to ten."""
    from matplotlib import colormaps

    if count <= 20:
        colormap = colormaps["tab10" if count <= 10 else "tab20"]
        return np.array([colormap(number)[:3] for number in range(count)])
    return np.array(colormaps["hsv"](np.linspace(0, 1, count, endpoint=False)))[:, :3]


def _mixed(mixture: FittedMixture, X: Rows, colours: Array) -> Array:
    """Return the experts' colours [N, 3], mixed by the gate's weights of each row."""
    return np.clip(np.exp(mixture.log_gates(X)) @ colours, 0, 1)


def _range(values: Array, points: int) -> Array:
    low, high = values.min(), values.max()
    margin = _MARGIN * (high - low) or 1.0
    return np.linspace(low - margin, high + margin, points)


def _draw_curves(ax: Any, mixture: FittedMixture, values: Array, colours: Array) -> None:
    from matplotlib.collections import LineCollection

    places = _range(values, CURVE_POINTS)
    rows = places[:, None]
    weights = np.exp(mixture.log_gates(rows))  # [P, E]
    output = -1 if mixture.kind == "probabilities" else 0
    predictions = mixture.outputs(rows)[:, :, output]
    of_weights = ax.twinx()
    # The predictions' axes are in front, and let the areas behind them shine through.
    ax.set_zorder(of_weights.get_zorder() + 1)
    ax.patch.set_visible(False)
    for expert, colour in enumerate(colours):
        of_weights.fill_between(places, weights[:, expert], color=colour, alpha=0.2, linewidth=0)
        points = np.stack([places, predictions[:, expert]], axis=1)
        alphas = _FAINTEST + (1 - _FAINTEST) * weights[1:, expert]
        segments = np.stack([points[:-1], points[1:]], axis=1)
        shades = np.column_stack([np.tile(colour, (len(segments), 1)), alphas])
        ax.add_collection(LineCollection([*segments], colors=shades, linewidths=2))
    ax.plot(places, mixture.combine(rows)[:, output], color="black", linewidth=1, linestyle="--")
    ax.plot(values, np.zeros(len(values)), "|", color="black", alpha=0.3, clip_on=False,
            transform=ax.get_xaxis_transform())  # fmt: skip
    ax.autoscale_view()
    ax.set_xlim(places[0], places[-1])
    trusted = predictions[weights > 0.05]
    if mixture.kind == "probabilities":
        ax.set_ylim(-0.02, 1.02)
        ax.set_ylabel("probability of the last class (lines)")
    else:
        margin = _MARGIN * np.ptp(trusted) or 1.0
        ax.set_ylim(trusted.min() - margin, trusted.max() + margin)
        ax.set_ylabel("prediction (lines; dashed: the mixture's)")
    of_weights.set_ylim(0, 1)
    of_weights.set_ylabel("gate's weight (areas)")


def _draw_plane(ax: Any, mixture: FittedMixture, X: Array, colours: Array) -> None:
    across, up = (_range(X[:, axis], GRID_POINTS) for axis in (0, 1))
    grid = np.stack(np.meshgrid(across, up), axis=-1)  # [P, P, 2]
    image = _mixed(mixture, grid.reshape(-1, 2), colours).reshape(GRID_POINTS, GRID_POINTS, 3)
    extent = (across[0], across[-1], up[0], up[-1])
    ax.imshow(
        0.45 + 0.55 * image, origin="lower", extent=extent, aspect="auto", interpolation="bilinear"
    )
    ax.scatter(*X.T, s=14, c=_mixed(mixture, X, colours), edgecolors="black", linewidths=0.3)


def _components(rows: Array) -> Array:
    """Return the two first principal components [N, 2] of rows [N, F]."""
    centred = rows - rows.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    scores = left * sizes
    scores = np.pad(scores, ((0, 0), (0, max(0, 2 - scores.shape[1]))))
    return scores[:, :2]


def _name_experts(ax: Any, mixture: FittedMixture, colours: Array) -> None:
    from matplotlib.patches import Patch

    shown = list(zip(mixture.experts, colours, strict=True))
    patches = [Patch(color=colour, label=name) for name, colour in shown[:_MAX_NAMED]]
    more = len(shown) - len(patches)
    if more:
        patches.append(Patch(color="none", label=f"and {more} more"))
    ax.legend(handles=patches, fontsize="small", framealpha=0.8)
