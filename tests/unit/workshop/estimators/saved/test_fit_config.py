"""The configuration of ``expertmesh fit``: the estimators that it makes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline
from sklearn.svm import SVR

from cluster.errors import ConfigError
from workshop.estimators.estimators import AdaptiveMixtureClassifier
from workshop.estimators.saved.fit_config import build, load_fit_config

ADAPTIVE: dict[str, Any] = {"estimator": "adaptive", "task": "classification", "target": "kind"}
OF_EXPERTS: dict[str, Any] = {
    "estimator": "of_experts",
    "task": "regression",
    "target": "price",
    "experts": {"line": "Ridge"},
}


def built(document: Any, folder: Path) -> Any:
    file = folder / "fit.yaml"
    file.write_text(
        document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    )
    return build(load_fit_config(file), file)


def test_parameters_and_the_seed_are_the_estimators(tmp_path: Path) -> None:
    document = {**ADAPTIVE, "seed": 7, "parameters": {"n_experts": 3, "experts": "mlp"}}
    estimator = built(document, tmp_path)
    assert type(estimator) is AdaptiveMixtureClassifier
    assert (estimator.n_experts, estimator.experts, estimator.random_state) == (3, "mlp", 7)


def test_experts_are_classes_of_scikit_learn_behind_a_scaler(tmp_path: Path) -> None:
    experts = {
        "line": "Ridge",
        "curve": {"estimator": "SVR", "parameters": {"C": 30.0}},
        "raw": {"estimator": "Ridge", "scaled": False},
    }
    estimator = built({**OF_EXPERTS, "experts": experts}, tmp_path)
    line, curve, raw = (expert for _, expert in estimator.experts)
    assert [name for name, _ in estimator.experts] == ["line", "curve", "raw"]
    assert isinstance(line, Pipeline)
    assert isinstance(line[-1], Ridge)
    assert isinstance(curve[-1], SVR)
    assert curve[-1].C == 30.0
    assert isinstance(raw, Ridge)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("a: [", ": is not YAML"),
        ("- a", ": must be keys and values, such as `target: price`"),
        ({**ADAPTIVE, "targets": "a"}, "targets: unknown key; allowed keys: estimator, task,"),
        ({**ADAPTIVE, "estimator": "forest"}, "estimator: Input should be 'adaptive', 'hierarch"),
        ({"estimator": "adaptive", "task": "regression"}, "target: Field required"),
        ({**ADAPTIVE, "target": ["a", "b"]}, "a classification has one target"),
        ({**ADAPTIVE, "target": []}, "target: must be different columns, at least one"),
        ({**ADAPTIVE, "features": ["a", "a"]}, "features: must be different columns"),
        ({**ADAPTIVE, "features": ["kind"]}, "column 'kind' is both target and feature"),
        ({**ADAPTIVE, "held_out": 1}, "held_out: Input should be less than 1 (given: 1)"),
        ({**ADAPTIVE, "experts": {"a": "SVC"}}, "estimator adaptive does not take the key experts"),
        ({**OF_EXPERTS, "experts": None}, "estimator of_experts needs the key experts"),
        ({**OF_EXPERTS, "experts": {}}, "experts: must have at least one expert"),
        ({**OF_EXPERTS, "experts": {"a": {"estimator": "SVR", "scale": True}}},
         "experts.a.scale: unknown key; allowed keys: estimator, parameters, scaled"),
        ({**OF_EXPERTS, "experts": {"a": "Svr"}},
         "experts.a.estimator: 'Svr' is no regressor of scikit-learn; did you mean SVR"),
        ({**OF_EXPERTS, "experts": {"a": "SVC"}}, "experts.a.estimator: 'SVC' is no regressor"),
        ({**OF_EXPERTS, "experts": {"a": "VotingRegressor"}}, "'VotingRegressor' is no regressor"),
        ({**OF_EXPERTS, "experts": {"a": {"estimator": "SVR", "parameters": {"c": 1}}}},
         "experts.a.parameters.c: is no parameter; parameters: C, cache_size"),
        ({**ADAPTIVE, "parameters": {"experts_": 1}}, "parameters.experts_: is no parameter"),
        ({**ADAPTIVE, "parameters": {"verbose": 1}}, "parameters.verbose: is no parameter"),
        ({**OF_EXPERTS, "parameters": {"experts": []}},
         "parameters.experts: is given by the key experts"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_what_is_allowed(
    document: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        built(document, tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "fit.yaml"))
    assert message in str(caught.value)
