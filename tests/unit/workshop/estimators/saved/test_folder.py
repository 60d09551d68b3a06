"""Saved, served in this process, and loaded: the same numbers, and nothing but whole folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from cluster.errors import CheckpointError
from experts.checkpoint.mixture import open_mixture
from tests.local_mixture import LocalMixture
from tests.unit.workshop.estimators.planted import (
    FEATURES,
    PlantedClassifier,
    PlantedRegressor,
    layers_of,
    recurrent_part,
    torch_rnn,
    tree,
)
from workshop.estimators.parts import EstimatorPart, FittedMixture, GatePart
from workshop.estimators.saved import record
from workshop.estimators.saved.folder import load

TOLERANCE = 1e-12
SOURCE = np.random.default_rng(11)
ROWS = SOURCE.normal(size=(60, FEATURES))
VALUES = np.stack([np.sin(2 * ROWS[:, 0]), ROWS @ [1.0, -1.0, 0.5]], axis=1)
LABELS = np.array(["low", "middle", "high"])[np.digitize(VALUES[:, 1], [-0.7, 0.7])]

REGRESSORS = [
    LinearRegression(),
    Ridge(),
    make_pipeline(StandardScaler(), SVR()),
    RandomForestRegressor(5, random_state=0),
    HistGradientBoostingRegressor(max_iter=3),
    KNeighborsRegressor(),
    DecisionTreeRegressor(random_state=0),
    MLPRegressor(hidden_layer_sizes=(4,), max_iter=20, random_state=0),
]
CLASSIFIERS = [
    LogisticRegression(),
    CalibratedClassifierCV(SVC(), ensemble=False, cv=2),
    RandomForestClassifier(5, random_state=0),
    HistGradientBoostingClassifier(max_iter=3),
    KNeighborsClassifier(),
    DecisionTreeClassifier(random_state=0),
    make_pipeline(StandardScaler(), MLPClassifier((4,), max_iter=20, random_state=0)),
]


class Doubled(RegressorMixin, BaseEstimator):
    """An estimator of the user's own, whose type no served file may have."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Doubled:
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        return 2 * X[:, 0]


pytestmark = pytest.mark.filterwarnings("ignore:.*iterations")  # networks of a few steps will do


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for planted in (PlantedRegressor, PlantedClassifier):
        monkeypatch.setitem(record.ESTIMATORS, planted.__name__, planted.__module__)


def flat(experts: dict[str, Any], top_k: int | None, **changes: Any) -> FittedMixture:
    gate = GatePart(layers_of(np.random.default_rng(1), FEATURES, len(experts)), tuple(experts))
    gate = GatePart(gate.layers, gate.choices, top_k)
    return FittedMixture("top", {"top": gate}, experts, **{"row_shape": (FEATURES,), **changes})


def recurrent(cell: str, width: int, **changes: Any) -> FittedMixture:
    gate = GatePart(layers_of(np.random.default_rng(2), FEATURES, 2), ("a", "b"), pool="mean")
    link = "softmax" if changes["kind"] == "probabilities" else "none"
    experts = {name: recurrent_part(cell, torch_rnn(cell, width), link) for name in "ab"}
    return FittedMixture(
        "top", {"top": gate}, experts, row_shape=(-1, FEATURES), width=width, **changes
    )


def check_served(fitted: Any, folder: Path, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Save, and compare the served prediction with the estimator's own; returns the served one."""
    fitted.save(folder)
    served = LocalMixture(open_mixture(folder)).predict({"x": rows})
    own = fitted.predict(rows)
    if "label" in served:
        shares = fitted.predict_proba(rows)
        np.testing.assert_allclose(served["probabilities"], shares, rtol=TOLERANCE, atol=TOLERANCE)
        assert served["label"][:, 0].tolist() == own.tolist()
    else:
        value = served["value" if "value" in served else "mean"]
        own = own.reshape(value.shape)
        np.testing.assert_allclose(value, own, rtol=TOLERANCE, atol=TOLERANCE)
    weights = np.zeros((len(rows), len(fitted.mixture_.experts)))
    np.put_along_axis(weights, np.maximum(served["experts"], 0), served["weights"], axis=1)
    own_weights = fitted.responsibilities(rows)
    np.testing.assert_allclose(weights, own_weights, rtol=TOLERANCE, atol=TOLERANCE)
    return served


def check_loaded(fitted: Any, folder: Path, rows: np.ndarray, y: np.ndarray) -> Any:
    loaded = load(folder)
    assert type(loaded) is type(fitted)
    np.testing.assert_array_equal(loaded.predict(rows), fitted.predict(rows))
    np.testing.assert_allclose(
        loaded.responsibilities(rows, y), fitted.responsibilities(rows, y), rtol=TOLERANCE
    )
    assert vars(loaded).keys() == vars(fitted).keys()
    return loaded


@pytest.mark.parametrize("kind", ["density", "one deviation", "probabilities"])
def test_a_tree_of_networks_is_served_and_loaded(tmp_path: Path, kind: str) -> None:
    if kind == "probabilities":
        fitted: Any = PlantedClassifier.of(tree(1, kind=kind, width=3)).fit(ROWS, LABELS)
        y = LABELS
    else:
        changes = {} if kind == "density" else {"deviations": np.full((3, 2), 0.75)}
        fitted, y = PlantedRegressor.of(tree(1, **changes)).fit(ROWS, VALUES), VALUES
    check_served(fitted, tmp_path / "tree", ROWS)
    loaded = check_loaded(fitted, tmp_path / "tree", ROWS, y)
    assert loaded.log_likelihood_ == fitted.log_likelihood_
    np.testing.assert_array_equal(loaded.expert_usage_, fitted.expert_usage_)


def test_a_density_is_served_with_variance_and_log_density(tmp_path: Path) -> None:
    fitted = PlantedRegressor.of(tree(2)).fit(ROWS, VALUES)
    fitted.save(tmp_path / "density")
    served = LocalMixture(open_mixture(tmp_path / "density")).predict({"x": ROWS, "y": VALUES})
    logs = fitted.mixture_.log_density(ROWS, VALUES)
    np.testing.assert_allclose(served["log_density"][:, 0], logs, rtol=1e-11)
    weights, means = fitted.responsibilities(ROWS), fitted.mixture_.outputs(ROWS)
    squares = fitted.mixture_.deviations**2 + (means - fitted.predict(ROWS)[:, None]) ** 2
    np.testing.assert_allclose(
        served["variance"], np.einsum("ne,ned->nd", weights, squares), rtol=1e-11
    )


@pytest.mark.parametrize("cell", ["plain", "gru", "lstm"])
@pytest.mark.parametrize("kind", ["density", "probabilities"])
def test_recurrent_experts_are_served_and_loaded(tmp_path: Path, cell: str, kind: str) -> None:
    rows = SOURCE.normal(size=(30, 4, FEATURES))
    if kind == "density":
        mixture = recurrent(cell, 2, kind=kind, deviations=np.array([[1.0, 2.0], [0.5, 0.25]]))
        fitted, y = PlantedRegressor.of(mixture).fit(rows, VALUES[:30]), VALUES[:30]
    else:
        mixture = recurrent(cell, 3, kind=kind)
        fitted, y = PlantedClassifier.of(mixture).fit(rows, LABELS[:30]), LABELS[:30]
    check_served(fitted, tmp_path / cell, rows)
    check_loaded(fitted, tmp_path / cell, rows, y)


@pytest.mark.parametrize("top_k", [None, 2])
def test_regressors_of_scikit_learn_are_served_and_loaded(
    tmp_path: Path, top_k: int | None
) -> None:
    values = VALUES[:, 0]
    experts = {
        f"e{number}": EstimatorPart(expert.fit(ROWS, values))
        for number, expert in enumerate(REGRESSORS)
    }
    deviations = np.arange(1.0, 1 + len(experts))[:, None]
    mixture = flat(experts, top_k, kind="density", width=1, deviations=deviations)
    fitted = PlantedRegressor.of(mixture).fit(ROWS, values)
    served = check_served(fitted, tmp_path / "m", ROWS)
    assert "value" in served, "the format has no deviations of scikit-learn's experts"
    loaded = check_loaded(fitted, tmp_path / "m", ROWS, values)
    np.testing.assert_array_equal(loaded.mixture_.deviations, deviations)


def test_one_deviation_of_all_estimators_is_served_as_a_density(tmp_path: Path) -> None:
    experts = {
        name: EstimatorPart(Ridge(place).fit(ROWS, VALUES)) for place, name in enumerate("ab")
    }
    mixture = flat(experts, None, kind="density", width=2, deviations=np.full((2, 2), 0.5))
    fitted = PlantedRegressor.of(mixture).fit(ROWS, VALUES)
    assert "variance" in check_served(fitted, tmp_path / "m", ROWS)
    check_loaded(fitted, tmp_path / "m", ROWS, VALUES)


@pytest.mark.parametrize("labels", ["texts", "integers", "booleans", "whole floats", "objects"])
def test_classifiers_of_scikit_learn_are_served_and_loaded(tmp_path: Path, labels: str) -> None:
    y = {
        "texts": LABELS,
        "integers": np.digitize(VALUES[:, 1], [-0.7, 0.7]) * 3,
        "booleans": VALUES[:, 1] > 0,
        "whole floats": np.digitize(VALUES[:, 1], [-0.7, 0.7]).astype(float),
        "objects": LABELS.astype(object),
    }[labels]
    classes = np.unique(y)
    experts = {}
    for number, expert in enumerate(CLASSIFIERS if labels == "texts" else CLASSIFIERS[:1]):
        # The first knows every class, and the others do not know the last.
        rows = (y != classes[-1]) | (number == 0) | (len(classes) == 2)
        fitted_expert = expert.fit(ROWS[rows], y[rows])
        places = np.searchsorted(classes, fitted_expert.classes_)
        experts[f"e{number}"] = EstimatorPart(fitted_expert, "predict_proba", places, len(classes))
    mixture = flat(experts, None, kind="probabilities", width=len(classes), floor=1e-3)
    fitted = PlantedClassifier.of(mixture).fit(ROWS, y)
    check_served(fitted, tmp_path / "m", ROWS)
    loaded = check_loaded(fitted, tmp_path / "m", ROWS, y)
    assert loaded.classes_.dtype == classes.dtype
    assert loaded.mixture_.floor == 1e-3


def test_parameters_come_back(tmp_path: Path) -> None:
    value = {"pair": (1, None), "list": [1.5, "text", True], "array": np.arange(3), "inf": np.inf}
    pipeline = make_pipeline(StandardScaler(), Ridge(3.0))
    estimator = [("one", pipeline), ("two", SVR(C=2.0))]
    fitted = PlantedRegressor.of(tree(3), value=value, estimator=estimator).fit(ROWS, VALUES)
    fitted.save(tmp_path / "m")
    loaded = PlantedRegressor.load(tmp_path / "m")
    assert repr(loaded.value) == repr(value)
    assert repr(loaded.estimator) == repr(estimator)
    with pytest.raises(TypeError, match="has a PlantedRegressor, not a PlantedClassifier"):
        PlantedClassifier.load(tmp_path / "m")


def test_the_card_says_how_to_serve_and_ask(tmp_path: Path) -> None:
    fitted = PlantedRegressor.of(tree(4), value=7).fit(ROWS, VALUES)
    fitted.save(tmp_path / "planted")
    card = (tmp_path / "planted" / "README.md").read_text(encoding="utf-8")
    for text in (
        "# planted", "| Rows | `x`, FP64 [3] |", "| Experts | 1 linear, 2 mlp |",
        "| Training rows | 60 |", "| value | `7` |", f"| a | {fitted.expert_usage_[0]:.4f} |",
        'PlantedRegressor.load("PATH/planted")',
    ):  # fmt: skip
        assert text in card
    block = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {"models": [{"id": "planted", "path": "PATH/planted"}]}
    asked = json.loads(card.split("-d '")[1].split("'")[0])
    (given,) = asked["inputs"]
    rows = np.array(given["data"])
    assert list(rows.shape) == given["shape"]
    assert LocalMixture(open_mixture(tmp_path / "planted")).predict({given["name"]: rows})


def test_the_card_has_the_scores_that_there_are(tmp_path: Path) -> None:
    planted = PlantedRegressor.of(tree(4, kind="mean", width=1, deviations=None))
    planted.n_samples_fit_, planted.n_features_in_, planted.n_outputs_ = 9, FEATURES, 1
    planted.expert_usage_ = np.full(3, 1 / 3)
    check_served(planted, tmp_path / "without", ROWS)
    card = (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    assert "| Combination | mean of 1 value |" in card
    assert "likelihood" not in card
    assert load(tmp_path / "without").mixture_.deviations is None
    planted.validation_scores_ = np.array([-3.0, -1.25, -2.0])
    planted.save(tmp_path / "held-out")
    card = (tmp_path / "held-out" / "README.md").read_text(encoding="utf-8")
    assert "| Mean log likelihood, rows held out | -1.25 |" in card


def test_a_folder_with_files_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    fitted = PlantedRegressor.of(tree(5)).fit(ROWS, VALUES)
    (tmp_path / "empty").mkdir()
    fitted.save(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds other files"):
        fitted.save(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"holds other files|cannot be written"):
            fitted.save(taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def _with_own_estimator() -> Any:
    mixture = flat({"a": EstimatorPart(Doubled())}, None, kind="mean", width=1)
    return _unchecked(PlantedRegressor.of(mixture))


def _with_infinite_weights() -> Any:
    mixture = tree(6)
    mixture.experts["a"].layers[0][0][0, 0] = np.inf
    return _unchecked(PlantedRegressor.of(mixture))


def _with_fractions_as_labels() -> Any:
    planted = PlantedClassifier.of(tree(6, kind="probabilities", width=3))
    planted.classes_ = np.array([0.5, 1.5, 2.5])
    return _unchecked(planted)


def _with(value: Any) -> Any:
    """Return an estimator with a parameter that is an estimator or any value."""
    name = "estimator" if isinstance(value, BaseEstimator) else "value"
    return _unchecked(PlantedRegressor.of(tree(6), **{name: value}))


def _unchecked(planted: Any) -> Any:
    """Return an estimator with the records of a fit, of data that its experts do not take."""
    planted.n_samples_fit_, planted.log_likelihood_, planted.n_features_in_ = 1, 0.0, FEATURES
    planted.expert_usage_ = np.full(len(planted.mixture_.experts), 1.0)
    return planted


@pytest.mark.parametrize(
    ("make", "field", "message"),
    [
        (_with_own_estimator, "a.skops: experts.a", "types that are not allowed.*Doubled"),
        (_with_infinite_weights, "a.safetensors: experts.a", "not finite"),
        (_with_fractions_as_labels, "classes_", "must be integers or texts"),
        (lambda: _with(np.random.RandomState(0)), "parameters.value", "RandomState cannot be sav"),
        (lambda: _with(Doubled()), "parameters/0.skops", "types that are not allowed.*Doubled"),
    ],
)
def test_nothing_is_written_of_an_estimator_that_cannot_be_served(
    tmp_path: Path, make: Callable[[], Any], field: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        make().save(tmp_path / "m")
    assert raised.value.field.endswith(field)
    assert raised.value.field == field or str(tmp_path / "m") in raised.value.field
    assert list(tmp_path.iterdir()) == []


def test_another_class_is_not_saved(tmp_path: Path) -> None:
    class Other(PlantedRegressor):
        pass

    with pytest.raises(CheckpointError, match="Other is not one of the estimators"):
        Other.of(tree(7)).fit(ROWS, VALUES).save(tmp_path / "m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(record.ESTIMATORS, PlantedRegressor.__name__, PlantedRegressor.__module__)
        PlantedRegressor.of(tree(8), estimator=Ridge()).fit(ROWS, VALUES).save(folder)
    return folder


def _change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(format=2), "has the format 2; this version reads 1"),
        (lambda content: [], "has the format None"),
        (_change(**{"class": "Ridge"}), "'Ridge' is not one of the estimators"),
        (_change(**{"class": "os.system"}), "is not one of the estimators"),
        (_change(parameters={"other": 1}), "other is unknown"),
        (_change(parameters=3), "no record of an estimator"),
        (_change(attributes={"predict": 1}), "predict is no attribute"),
        (_change(attributes={"__class__": 1}), "__class__ is no attribute"),
        (_change(mixture={"experts": {"mapping": {}}}), "experts is unknown"),
        (_change(parameters={"value": {"code": "x"}}), "a value of no known kind"),
        (_change(parameters={"value": {"array": [1], "dtype": "V8"}}), "of no known kind"),
        (_change(parameters={"value": {"estimator": "../m.skops"}}), "no file of the folder"),
        (_change(parameters={"value": {"estimator": "/etc/passwd"}}), "no file of the folder"),
        (_change(parameters={"value": {"estimator": "no.skops"}}), "No such file"),
        (_change(parameters={"value": {"estimator": "README.md"}}), "not a complete skops file"),
    ],
)
def test_a_wrong_record_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    file = folder / record.RECORD_FILE
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("estimator.json", b"{", "is not JSON"),
        ("estimator.json", b"[" * 100_000, "is not JSON"),
        ("estimator.json", None, "No such file"),
        ("mixture.yaml", b"format: 3", "format"),
        ("gates.safetensors", b"xx", "not a safetensors file"),
        ("a.safetensors", None, "missing file"),
    ],
)
def test_a_damaged_folder_is_refused(
    saved: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
