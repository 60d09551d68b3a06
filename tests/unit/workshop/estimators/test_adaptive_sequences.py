"""Recurrent experts of unlike cells, and sequences of several lengths.

Dimension letters: N rows, T steps of a row, F features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from experts.checkpoint.mixture import open_mixture
from tests.local_mixture import LocalMixture
from workshop.estimators.adaptive.estimators import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
)
from workshop.estimators.adaptive.network import AdaptiveNetwork, Architecture, Cell, PackedRows
from workshop.estimators.saved.fit_config import experts_alone
from workshop.estimators.sequences import Sequences, sequences_of

CELLS: list[Cell] = ["plain", "gru", "lstm"]
SETTINGS: dict[str, Any] = {
    "experts": "rnn", "cell": CELLS, "hidden_layer_sizes": (3,), "n_init": 1, "max_iter": 15,
    "random_state": 0,
}  # fmt: skip
NUM_ROWS = 60

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

Ragged = list[np.ndarray]


def ragged(num_rows: int = NUM_ROWS, seed: int = 0) -> tuple[Ragged, np.ndarray]:
    """Return sequences [T, 2] of 1 to 9 steps, and the sum [N] of their last steps' values."""
    source = np.random.RandomState(seed)
    rows = [5 + 2 * source.randn(source.randint(1, 10), 2) for _ in range(num_rows)]
    return rows, np.array([row[-1].sum() for row in rows])


def regressor(**parameters: Any) -> AdaptiveMixtureRegressor:
    return AdaptiveMixtureRegressor(3, **{**SETTINGS, **parameters})


def classifier(**parameters: Any) -> AdaptiveMixtureClassifier:
    return AdaptiveMixtureClassifier(3, **{**SETTINGS, **parameters})


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_packed_rows_have_the_values_and_gradients_of_each_row_alone(pool: Any) -> None:
    rows, _ = ragged(12)
    network = AdaptiveNetwork(
        Architecture(
            num_experts=3, gate_inputs=2, num_inputs=2, width=2, experts="rnn", cells=tuple(CELLS),
            hidden_sizes=(3, 3), pool=pool,
        )
    )  # fmt: skip
    network.draw(np.random.RandomState(1))
    packed = PackedRows(sequences_of(rows))
    alone = [torch.from_numpy(row)[None] for row in rows]
    weights = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(outputs: torch.Tensor, log_gates: torch.Tensor) -> torch.Tensor:
        return weights @ (outputs * log_gates.exp()[:, :, None]).sum(dim=(1, 2))

    together = network.outputs(packed), network.log_gates(packed, None)
    each = (
        torch.cat([network.outputs(row) for row in alone]),
        torch.cat([network.log_gates(row, None) for row in alone]),
    )
    for found, expected in zip(together, each, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    parameters = list(network.parameters())
    gradients = [torch.autograd.grad(value(*pair), parameters) for pair in (together, each)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_some_rows_are_packed_as_if_they_were_all() -> None:
    rows, _ = ragged(20)
    some = np.array([17, 3, 4, 3])
    packed = PackedRows(sequences_of(rows))[torch.from_numpy(some)]
    assert [row.tolist() for row in torch.nn.utils.rnn.unpack_sequence(packed.packed)] == [
        rows[place].tolist() for place in some
    ]
    np.testing.assert_allclose(packed.means, [rows[place].mean(axis=0) for place in some])
    assert packed.lasts.tolist() == [rows[place][-1].tolist() for place in some]


@pytest.mark.parametrize("make", [regressor, classifier])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_row_has_the_same_bits_alone_and_among_rows_of_other_lengths(
    make: Any, top_k: int | None
) -> None:
    rows, y = ragged()
    fitted = make(top_k=top_k, max_iter=3).fit(rows, y if make is regressor else y > 10)
    methods = [fitted.predict, fitted.responsibilities]
    if make is classifier:
        methods.append(fitted.predict_proba)
    for method in methods:
        crowd = method(rows)
        for place, row in enumerate(rows[:10]):
            assert np.array_equal(method([row]), crowd[place : place + 1])
            assert np.array_equal(method(row[None]), crowd[place : place + 1])
        assert np.array_equal(method(rows[::-1])[::-1], crowd)
    for other in (np.array(rows, object), pandas.Series(rows), tuple(rows)):
        assert np.array_equal(fitted.predict(other), fitted.predict(rows))


def test_a_list_of_one_length_is_the_array() -> None:
    source = np.random.RandomState(0)
    x, y = source.randn(40, 5, 2), source.randn(40)
    of_array, of_list = (regressor(max_iter=3).fit(given, y) for given in (x, list(x)))
    assert np.array_equal(of_array.predict(x), of_list.predict(list(x)))
    assert of_list.n_features_in_ == 2


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
def test_weights_and_a_held_out_share_are_those_of_rows(solver: str) -> None:
    rows, y = ragged()
    whole = np.where(np.arange(NUM_ROWS) % 3 == 0, 0.0, 1.0)
    settings: dict[str, Any] = {"solver": solver, "max_iter": 4, "batch_size": 16}
    weighted = regressor(**settings).fit(rows, y, sample_weight=whole)
    kept = [row for row, weight in zip(rows, whole, strict=True) if weight]
    fewer = regressor(**settings).fit(kept, y[whole > 0])
    assert np.array_equal(weighted.predict(rows), fewer.predict(rows))
    assert weighted.n_samples_fit_ == len(kept)
    early = regressor(**settings, early_stopping=True).fit(rows, y)
    assert early.n_samples_fit_ == 54


@pytest.mark.parametrize("cells", [CELLS, tuple(CELLS), np.array(CELLS)])
def test_it_is_saved_served_and_loaded(tmp_path: Path, cells: Any) -> None:
    rows, y = ragged()
    labels = np.where(y > 10, "high", "low")
    fitted = classifier(top_k=2, cell=cells, max_iter=3).fit(rows, labels)
    assert [part.cell for part in fitted.mixture_.experts.values()] == CELLS
    assert fitted.mixture_.row_shape == (-1, 2)
    fitted.save(tmp_path / "ragged")
    served = LocalMixture(open_mixture(tmp_path / "ragged"))
    loaded = AdaptiveMixtureClassifier.load(tmp_path / "ragged")
    assert type(loaded.cell) is type(cells)
    assert list(loaded.cell) == CELLS
    assert np.array_equal(loaded.predict_proba(rows), fitted.predict_proba(rows))
    for row, expected in zip(rows, fitted.predict_proba(rows), strict=True):
        outputs = served.predict({"x": row[None]})
        np.testing.assert_allclose(outputs["probabilities"][0], expected, rtol=0, atol=1e-12)


def test_a_warm_start_keeps_every_experts_cell() -> None:
    rows, y = ragged()
    mixture = regressor(max_iter=3, warm_start=True).fit(rows, y)
    before = mixture.log_likelihood_
    assert mixture.fit(rows, y).log_likelihood_ > before
    mixture.set_params(cell=["plain", "gru", "gru"])
    with pytest.raises(ValueError, match=r"warm_start: experts .*cell lstm.* \(now: rnn, cell gru"):
        mixture.fit(rows, y)
    with pytest.raises(ValueError, match="expecting 2 features"):
        mixture.set_params(cell=CELLS).fit([row[:, :1] for row in rows], y)


def test_search_pipeline_split_and_clone() -> None:
    rows, y = ragged()
    train, _, y_train, _ = train_test_split(rows, y, random_state=0)
    pipeline = make_pipeline(FunctionTransformer(_halved), regressor(max_iter=2))
    cells = ["gru", CELLS, ("lstm", "lstm", "gru")]
    search = GridSearchCV(pipeline, {"adaptivemixtureregressor__cell": cells}, cv=2)
    assert search.fit(train, y_train).best_params_["adaptivemixtureregressor__cell"] in cells
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert clone(regressor()).cell == CELLS


def _halved(rows: Ragged) -> Ragged:
    return [row / 2 for row in rows]


def test_each_cell_is_compared_alone() -> None:
    alone = experts_alone(classifier(cell=["gru", "gru", "lstm"], top_k=2))
    assert list(alone) == ["one rnn expert, gru", "one rnn expert, lstm"]
    assert [(one.cell, one.n_experts) for one in alone.values()] == [("gru", 1), ("lstm", 1)]
    assert list(experts_alone(classifier(cell="gru"))) == ["one rnn expert"]
    assert list(experts_alone(classifier(experts="mlp"))) == ["one mlp expert"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cell": ["gru", "lstm"]}, r"one for each of n_experts=3 \(given: 2\)"),
        ({"cell": ["gru", "gru", "rnn"]}, "cell must be of gru, lstm, plain .*'rnn'"),
        ({"cell": ["gru", "gru", 3]}, r"cell must be .*\(given: 3\)"),
        ({"cell": [["gru"], ["gru"], ["gru"]]}, r"cell must be .*\(given: \['gru'\]\)"),
        ({"cell": "rnn"}, "The 'cell' parameter"),
        ({"cell": set(CELLS)}, "The 'cell' parameter"),
        ({"pool": "flatten"}, "pool='flatten' needs sequences of one length .* 1 to 9 steps"),
    ],
)
def test_wrong_parameters_are_refused_by_name(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        regressor(**parameters).fit(*ragged())


def test_experts_that_do_not_recur_have_no_cells() -> None:
    x = np.random.RandomState(0).randn(30, 2)
    assert regressor(experts="linear", cell=["gru"]).fit(x, x[:, 0]).score(x, x[:, 0]) > 0.9


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (np.zeros((0, 2)), r"X\[1\] must be a sequence .*\(0, 2\)"),
        (np.zeros(2), r"X\[1\] must be a sequence \[T, F\] .*\(2,\)"),
        (np.zeros((2, 3)), r"X\[1\] has 3 features, and X\[0\] has 2"),
        ([[1.0, 2.0], [3.0]], r"X\[1\] must be a sequence \[T, F\]: .*inhomogeneous"),
        (np.array([["a", "b"]]), r"X\[1\] must be an array of numbers \(given: <U1\)"),
        (np.array([[1j, 1j]]), r"X\[1\] must be an array of numbers \(given: complex128\)"),
        (csr_matrix(np.ones((1, 2))), r"X\[1\] must be an array of numbers \(given: csr_matrix\)"),
        (None, r"X\[1\] must be an array of numbers \(given: NoneType\)"),
        (np.array([[np.nan, 1.0]]), "Input X contains NaN"),
        (np.array([[np.inf, 1.0]]), "Input X contains infinity"),
        (pandas.DataFrame({"a": [1.0], "b": [2.0]}), r"X\[1\] has the columns \['a', 'b'\]"),
    ],
)
def test_a_wrong_row_is_named_by_its_place(row: Any, words: str) -> None:
    rows, y = ragged()
    fitted = regressor(max_iter=1).fit(rows, y)
    for given in ([rows[0], row], (rows[0], row)):
        with pytest.raises(ValueError, match=words):
            fitted.predict(given)
    with pytest.raises(ValueError, match=words):
        regressor(max_iter=1).fit([rows[0], row, *rows[2:]], y)


def test_lists_that_are_no_sequences_are_refused() -> None:
    rows, y = ragged()
    fitted = regressor(max_iter=1).fit(rows, y)
    for wrong, words in [
        ([], "0 sample|3 axes"),
        ([1.0, 2.0], "3 axes"),
        ([[1.0, 2.0], [3.0, 4.0]], "3 axes"),
        ([row[:, :1] for row in rows], "expecting 2 features"),
    ]:
        with pytest.raises(ValueError, match=words):
            fitted.predict(wrong)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        regressor().fit(rows[:-1], y)
    padded = np.full((2, 9, 2), np.nan)
    with pytest.raises(ValueError, match=r"list of arrays .* without padding"):
        fitted.predict(padded)
    flat = AdaptiveMixtureRegressor(2, experts="rnn", pool="flatten", n_init=1, max_iter=1)
    flat.fit(np.zeros((9, 4, 2)), np.arange(9))
    with pytest.raises(ValueError, match=r"must have 4 steps \(given: 3\)"):
        flat.predict([np.zeros((4, 2)), np.zeros((3, 2))])


def test_data_frames_keep_their_columns() -> None:
    rows, y = ragged()
    frames = [pandas.DataFrame(row, columns=["level", "mark"]) for row in rows]
    fitted = regressor(max_iter=1).fit(frames, y)
    assert fitted.feature_names_in_.tolist() == ["level", "mark"]
    assert np.array_equal(fitted.predict(frames), regressor(max_iter=1).fit(rows, y).predict(rows))
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict([frame[["mark", "level"]] for frame in frames])


def test_a_row_of_many_steps_takes_no_memory_for_the_others() -> None:
    """The steps are kept once; an array of all rows padded would have 2 GB."""
    rows: Ragged = [np.ones((1, 1))] * 500 + [np.ones((500_000, 1))]
    kept = sequences_of(rows)
    assert isinstance(kept, Sequences)
    assert PackedRows(kept).packed.data.shape == (500_500, 1)
