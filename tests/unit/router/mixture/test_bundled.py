"""The bundled mixtures against their libraries' own predictions, put together by loops, and cards.

Dimension letters: T rows, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn.datasets import load_diabetes, load_digits
from sklearn.metrics import accuracy_score, r2_score
from skops.io import get_untrusted_types, load
from threadpoolctl import threadpool_limits
from torch import nn

from benchmarks.bundled.hierarchy import make_data
from benchmarks.bundled.readings import make_batches
from benchmarks.bundled.trained import is_held_out
from experts.backends.check import check_mixture
from experts.checkpoint.identity import identity_of
from experts.checkpoint.mixture import Mixture, open_mixture
from tests.local_mixture import LocalMixture
from tests.unit.router.mixture.small_mixtures import leaves, softmax
from workshop.estimators.estimators import AdaptiveMixtureClassifier
from workshop.estimators.saved.folder import load as load_estimator

MODELS = Path(__file__).parents[4] / "deploy" / "models"
NAMES = ("digits", "diabetes", "hierarchy", "sequences")
MANY = 200
"""Rows that are computed by loops."""
_NUMBER = re.compile(r" (-?[\d,]*\d(?:\.\d+)?) ")


@pytest.fixture(autouse=True, scope="module")
def _one_thread_of_blas() -> Iterator[None]:
    """Threads of BLAS wait for each other longer than such small products take."""
    with threadpool_limits(1):
        yield


@cache
def opened(name: str) -> Mixture:
    return open_mixture(MODELS / name)


@cache
def local(name: str) -> LocalMixture:
    return LocalMixture(opened(name))


def estimator(name: str, file: str) -> Any:
    """Return an estimator of a mixture, loaded by skops alone."""
    path = MODELS / name / file
    return load(path, trusted=get_untrusted_types(file=path))


def tensors(name: str, file: str) -> dict[str, torch.Tensor]:
    return {key: t.double() for key, t in load_file(MODELS / name / file).items()}


def figures(name: str) -> dict[str, list[float]]:
    """Return the figures that a card has about the mixture and the single models, by row."""
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:this mixture|one|its|the function)[^|]*) \|(.*)\|$", card, re.M)
    return {title: [float(n.replace(",", "")) for n in _NUMBER.findall(row)] for title, row in rows}


def test_all_of_them_are_small() -> None:
    files = [file for name in NAMES for file in (MODELS / name).rglob("*")]
    assert sum(file.stat().st_size for file in files) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_check_and_has_the_identity_of_its_card(name: str) -> None:
    mixture = opened(name)
    assert all(num_bytes > 0 for num_bytes in check_mixture(mixture))
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert f"`{identity_of(mixture)}`" in card
    assert f"| {mixture.num_bytes:,} |" in card
    folder = MODELS / name
    named = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    of_estimator = {file for file in named if file.startswith(("estimator.json", "parameters/"))}
    assert named - of_estimator == {"README.md", "mixture.yaml", *mixture.tensors}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_its_card_has_the_reply_that_it_gives(name: str) -> None:
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    asked = yaml.safe_load(re.search(r"-d '(.*)'", card)[1])
    told = yaml.safe_load(re.search(r"```json\n(.*?)```", card, re.S)[1])
    spec = opened(name).spec
    inputs = {
        part["name"]: np.array(
            part["data"], {"FP32": "f4", "FP64": "f8", "UINT8": "u1"}[part["datatype"]]
        ).reshape(part["shape"])
        for part in asked["inputs"]
    }
    outputs = local(name).predict(inputs)
    assert [part["name"] for part in told["outputs"]] == list(outputs)
    for part, output in zip(told["outputs"], spec.outputs, strict=True):
        given = outputs[part["name"]]
        assert (part["shape"], part["datatype"]) == (list(given.shape), output.datatype)
        if given.dtype.kind == "f":
            np.testing.assert_allclose(given.ravel(), part["data"], 1e-5, 1e-9)
        else:
            assert given.ravel().tolist() == part["data"]


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    is_out = is_held_out(len(x))
    return x[is_out], y[is_out]


def test_digits_are_the_weighted_mean_of_three_libraries_own_probabilities() -> None:
    x, _ = digits()
    gate = tensors("digits", "gates.safetensors")
    names = list(opened("digits").spec.experts)
    experts = [estimator("digits", f"{name}.skops") for name in names]
    outputs = local("digits").predict({"pixels": x.astype(np.uint8).reshape(-1, 8, 8)})
    for row, pixels in enumerate(x[:30]):
        weights = softmax(gate["gate/weight"].numpy() @ pixels + gate["gate/bias"].numpy())
        expected = sum(
            weight * expert.predict_proba(pixels[None])[0]
            for weight, expert in zip(weights, experts, strict=True)
        )
        np.testing.assert_allclose(outputs["probabilities"][row], expected, 1e-6, 1e-9)
        assert outputs["label"][row].tolist() == [expected.argmax()]
        assert outputs["experts"][row].tolist() == [0, 1, 2]


@cache
def diabetes() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True, scaled=False)
    is_out = is_held_out(len(x))
    return x[is_out], y[is_out]


def scores(name: str) -> dict[int, float]:
    """Return a mixture's figures on rows that are held out, by their columns in its card."""
    if name == "digits":
        x, y = digits()
        outputs = local(name).predict({"pixels": x.astype(np.uint8).reshape(-1, 8, 8)})
        return {0: accuracy_score(y, outputs["label"][:, 0])}
    if name == "diabetes":
        x, y = diabetes()
        return {0: r2_score(y, local(name).predict({"patient": x})["progression"][:, 0])}
    if name == "hierarchy":
        data = make_data()
        is_out = is_held_out(len(data.x))
        x, y = data.x[is_out], data.y[is_out]
        outputs = local(name).predict({"x": x, "y": y[:, None]})
        return {0: r2_score(y, outputs["mean"][:, 0]), 1: outputs["log_density"].mean()}
    names = np.array(["low", "middle", "high"])
    is_right = [
        local(name).predict({"steps": batch.steps})["level"][:, 0] == names[batch.levels]
        for batch in make_batches()[3::4]
    ]
    return {1: np.concatenate(is_right).mean()}


@pytest.mark.parametrize(
    ("name", "least", "num_singles", "margin"),
    [
        ("digits", 0.99, 3, 0.0),
        ("diabetes", 0.42, 3, 0.0),
        ("hierarchy", 0.965, 4, 0.05),
        ("sequences", 0.98, 6, 0.0),
    ],
)
def test_it_is_as_good_as_its_card_and_better_than_single_models(
    name: str, least: float, num_singles: int, margin: float
) -> None:
    told, found = figures(name), scores(name)
    tolerance = 0.003 if name == "digits" else 0.001
    for column, score in found.items():
        assert score == pytest.approx(told["this mixture"][column], abs=tolerance)
    column, score = next(iter(found.items()))
    singles = [row for title, row in told.items() if title.startswith("one")]
    assert score >= least
    assert len(singles) == num_singles
    assert all(score > single[column] + margin for single in singles)
    if name == "digits":  # the logarithmic loss
        assert all(told["this mixture"][1] < single[1] for single in singles)


@pytest.mark.parametrize(
    ("name", "method", "rows", "output"),
    [
        ("digits", "predict_proba", lambda: digits()[0], "probabilities"),
        ("diabetes", "predict", lambda: diabetes()[0], "progression"),
        ("hierarchy", "predict", lambda: make_data().x[:MANY], "mean"),
    ],
)
def test_the_folder_is_loaded_as_the_estimator_that_made_it(
    name: str, method: str, rows: Callable[[], np.ndarray], output: str
) -> None:
    x = rows()
    loaded = load_estimator(MODELS / name)
    part = opened(name).spec.inputs[0]
    given = x.astype({"UINT8": "u1", "FP64": "f8"}[part.datatype]).reshape(-1, *part.shape)
    served = local(name).predict({part.name: given})[output]
    expected = getattr(loaded, method)(x).reshape(served.shape)
    rtol = 1e-6 if served.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(served, expected, rtol, 1e-9)


def test_hierarchy_is_the_product_rule_over_the_tree_written_out() -> None:
    spec = opened("hierarchy").spec
    data = make_data()
    x, y = data.x[:MANY], data.y[:MANY]
    outputs = local("hierarchy").predict({"x": x, "y": y[:, None]})
    experts = {name: tensors("hierarchy", f"{name}.safetensors") for name in spec.experts}
    gates = {
        key.replace("/", "."): tensor.numpy()
        for key, tensor in tensors("hierarchy", "gates.safetensors").items()
    }
    names = list(spec.experts)
    tree = {
        name: {"kind": "linear", "top_k": gate.top_k, "choices": _numbered(gate.choices, names)}
        for name, gate in spec.gates.items()
    }
    for row in range(MANY):
        shares = leaves(tree, gates, x[row], [])
        assert outputs["experts"][row].tolist() == sorted(shares)
        weights, given = np.array(list(shares.values())), torch.from_numpy(x[row])
        of_experts = [experts[names[e]] for e in shares]
        means, deviations = np.array(
            [nn.functional.linear(given, e["weight"], e["bias"]).tolist() for e in of_experts]
        ).T
        mean = weights @ means
        variance = weights @ (deviations**2 + means**2) - mean**2
        densities = np.exp(-0.5 * ((y[row] - means) / deviations) ** 2) / deviations
        log_density = np.log(weights @ densities / np.sqrt(2 * np.pi))
        expected = {"mean": mean, "variance": variance, "log_density": log_density}
        for name, value in expected.items():
            np.testing.assert_allclose(outputs[name][row, 0], value, 1e-10, 1e-12, err_msg=name)


def _numbered(choices: tuple[str, ...], names: list[str]) -> list[str]:
    """Return choices with the names that :func:`leaves` gives experts."""
    return [f"e{names.index(choice)}" if choice in names else choice for choice in choices]


def test_sequences_are_loaded_as_the_estimator_that_made_them() -> None:
    loaded = AdaptiveMixtureClassifier.load(MODELS / "sequences")
    assert list(loaded.mixture_.experts) == list(opened("sequences").spec.experts)
    batches = make_batches()[3::16]
    served = [
        local("sequences").predict({"steps": batch.steps})["probabilities"] for batch in batches
    ]
    expected = loaded.predict_proba([reading for batch in batches for reading in batch.steps])
    np.testing.assert_allclose(np.concatenate(served), expected, 1e-6, 1e-9)
