"""The pictures of which expert takes which rows, read back from matplotlib's axes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from tests.unit.workshop.estimators.planted import PlantedRegressor, layers_of
from workshop.estimators.parts import FittedMixture, GatePart, NetworkPart
from workshop.estimators.plots import GRID_POINTS, plot_experts

BLUE, ORANGE = to_rgb("C0"), to_rgb("C1")


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


def split(features: int, experts: int = 2, sharpness: float = 1e3) -> FittedMixture:
    """Return experts that share the rows by the first feature, below 0 and above."""
    weight = np.zeros((experts, features))
    weight[1:, 0] = sharpness
    bias = np.concatenate([[0.0, 0.0], np.full(experts - 2, -1e9)])
    names = tuple(f"expert{number}" for number in range(experts))
    gate = GatePart(((weight, bias),), names)
    parts = {
        name: NetworkPart(((np.full((1, features), float(number)), np.array([number])),))
        for number, name in enumerate(names)
    }
    return FittedMixture("top", {"top": gate}, parts, "mean", (features,), 1)


def test_the_legend_of_many_experts_is_short_and_unknown_features_are_refused() -> None:
    rows = np.random.default_rng(3).normal(size=(5, 2))
    ax = plot_experts(split(2, experts=25), rows)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert (len(texts), texts[-1]) == (21, "and 5 more")
    for features in ((0, 9), ("a", 1), (0, 1, 2)):
        with pytest.raises(ValueError, match="features"):
            plot_experts(split(4), np.zeros((3, 4)), features=features)


def test_one_feature_is_drawn_as_curves() -> None:
    ax = plot_experts(split(1, sharpness=3.0), np.linspace(-1, 1, 9)[:, None], ["age"])
    lines = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    for number, line in enumerate(lines):
        points = np.array(line.get_segments())[:, 0]
        np.testing.assert_allclose(points[:, 1], number * points[:, 0] + number, atol=1e-12)
    assert [to_rgb(line.get_colors()[0]) for line in lines] == [BLUE, ORANGE]
    (areas,) = (other for other in ax.figure.axes if other is not ax)
    right = areas.collections[1].get_paths()[0].vertices
    places, shares = right[right[:, 1] > 0].T
    np.testing.assert_allclose(shares, 1 / (1 + np.exp(-3 * places)), atol=1e-9)
    assert ax.get_xlabel() == "age"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["expert0", "expert1"]


def test_two_features_are_drawn_as_regions() -> None:
    X = np.random.default_rng(0).normal(size=(20, 2))
    ax = plot_experts(split(2), X)
    (image,) = ax.images
    pixels = image.get_array()
    assert pixels.shape == (GRID_POINTS, GRID_POINTS, 3)
    pale = [0.45 + 0.55 * np.array(colour) for colour in (BLUE, ORANGE)]
    np.testing.assert_allclose(pixels[:, 0], np.tile(pale[0], (GRID_POINTS, 1)))
    np.testing.assert_allclose(pixels[:, -1], np.tile(pale[1], (GRID_POINTS, 1)))
    (points,) = ax.collections
    np.testing.assert_array_equal(points.get_offsets(), X)
    expected = np.where(X[:, :1] < 0, BLUE, ORANGE)
    np.testing.assert_allclose(points.get_facecolors()[:, :3], expected, atol=1e-9)


def test_more_features_are_drawn_by_components_or_by_two_of_them() -> None:
    X = np.random.default_rng(1).normal(size=(30, 4)) * [1, 5, 1, 3]
    figure, given = pyplot.subplots()
    planted = PlantedRegressor.of(split(4))
    planted.n_features_in_ = 4
    ax = planted.plot_experts(X, ax=given)
    assert ax is given
    places = ax.collections[0].get_offsets()
    covariance = np.cov((X - X.mean(axis=0)).T)
    largest = np.sort(np.linalg.eigvalsh(covariance))[::-1][:2]
    np.testing.assert_allclose(np.var(places, axis=0, ddof=1), largest, rtol=1e-9)
    planted.feature_names_in_ = np.array(["a", "b", "c", "d"], object)
    with pytest.warns(UserWarning, match="feature names"):
        named = planted.plot_experts(X, features=("d", 0))
    np.testing.assert_array_equal(named.collections[0].get_offsets(), X[:, [3, 0]])
    assert (named.get_xlabel(), named.get_ylabel()) == ("d", "a")
    figure.canvas.draw()


def test_sequences_and_one_component_are_drawn() -> None:
    gate = GatePart(layers_of(np.random.default_rng(2), 1, 2), ("a", "b"), pool="mean")
    part = NetworkPart(((np.ones((1, 3)), np.zeros(1)),))
    mixture = FittedMixture("top", {"top": gate}, {"a": part, "b": part}, "mean", (3, 1), 1)
    ax = plot_experts(mixture, np.random.default_rng(2).normal(size=(8, 3, 1)))
    assert ax.collections[0].get_offsets().shape == (8, 2)
    alone = plot_experts(mixture, np.ones((1, 3, 1)))
    np.testing.assert_array_equal(alone.collections[0].get_offsets(), [[0, 0]])


def test_the_error_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'expertmesh\[plots\]'"):
        plot_experts(split(2), np.zeros((3, 2)))
