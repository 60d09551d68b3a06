"""The JSON Schema of deployment files, and what a file comes to with all defaults."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks.shipped import SERVE_KEYS
from cluster.errors import ConfigError
from router.cli.app import app
from router.config.deployment import load_deployment, parse_args
from router.serve.options import completed

DEPLOY = Path(__file__).resolve().parents[4] / "deploy"
FILES = sorted(DEPLOY.glob("*.yaml"))
FULL = {
    "models": [{"id": "a", "path": "/a", "dtype": "bfloat16", "max_model_len": 2}],
    "experts": {"actors": 3, "tls": {"certificate": "c", "key": "k", "authority": "a"}},
    "gateway": {"on_expert_loss": "drop"},
}


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["config", *words])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return checked(json.loads(run("schema")))


@pytest.fixture(scope="module")
def args() -> dict[str, Any]:
    return checked(json.loads(run("schema", "--args")))


def checked(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that is itself valid; this check takes longer than those of documents."""
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def is_valid(document: Any, schema: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_shipped_files_are_valid(
    file: Path, whole: dict[str, Any], args: dict[str, Any]
) -> None:
    document = yaml.safe_load(file.read_text())
    assert is_valid(document, whole)
    for application in document["applications"]:
        assert is_valid(application["args"], args)


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, Change] = {
    "an unknown key": lambda a: a.update(modles=[]),
    "an unknown key inside": lambda a: a["experts"].update(actorz=2),
    "a wrong type": lambda a: a["experts"].update(actors="two"),
    "too few": lambda a: a["experts"].update(actors=0),
    "not one of them": lambda a: a["models"][0].update(dtype="int3"),
    "a bad id": lambda a: a["models"][0].update(id="-"),
    "no models": lambda a: a.update(models=[]),
    "models missing": lambda a: a.pop("models"),
    "half of tls": lambda a: a["experts"].update(tls={"key": "k"}),
    "not above 0": lambda a: a["gateway"].update(default_timeout_s=0),
    "a port's number": lambda a: a["gateway"].update(listen={"http_port": "many"}),
    "no such port": lambda a: a["gateway"].update(listen={"port": 8000}),
}
WRONG_FILES: dict[str, Change] = {
    "no applications": lambda d: d.update(applications=[]),
    "no args": lambda d: d["applications"][0].pop("args"),
    "another builder": lambda d: d["applications"][0].update(import_path="other:build"),
    "Serve's part": lambda d: d["logging_config"].update(enable_access_log="many"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_FILES])
def test_wrong_args_and_files_are_invalid(
    name: str, whole: dict[str, Any], args: dict[str, Any]
) -> None:
    document = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    document["applications"][0]["args"] = given = copy.deepcopy(FULL)
    assert is_valid(given, args)
    assert is_valid(document, whole)
    if name in WRONG:
        WRONG[name](given)
        assert not is_valid(given, args)
    else:
        WRONG_FILES[name](document)
    assert not is_valid(document, whole)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_is_shown_is_a_file_that_means_the_same(
    file: Path, form: list[str], tmp_path: Path, whole: dict[str, Any]
) -> None:
    shown = run("show", str(file), *form)
    document = json.loads(shown) if form else yaml.safe_load(shown)
    assert is_valid(document, whole)
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert load_deployment(again) == load_deployment(file)
    original = completed(yaml.safe_load(file.read_text()))
    for one in (document, original):
        for application in one["applications"]:
            del application["args"]
    assert document == original


def test_a_new_file_is_one_that_shows_as_itself(tmp_path: Path, whole: dict[str, Any]) -> None:
    new = tmp_path / "my.yaml"
    new.write_text(run("new"))
    document = yaml.safe_load(new.read_text())
    assert is_valid(document, whole)
    assert load_deployment(new) == load_deployment(DEPLOY / "cluster.yaml")
    shown = yaml.safe_load(run("show", str(new)))
    args = shown["applications"][0]["args"]  # with the defaults
    assert args["experts"]["call_timeout_s"] == 10.0
    assert args["models"][0]["max_model_len"] is None
    assert args["gateway"]["on_expert_loss"] == "strict"
    assert {key: shown[key] for key in SERVE_KEYS} == {key: document[key] for key in SERVE_KEYS}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("applications: []", "at least one entry"),
        ("applications: [{import_path: 'router.app:build', args: {models: []}}]", "args.models"),
    ],
)
def test_a_wrong_file_is_one_line_and_2(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    if content is not None:
        file.write_text(content)
    result = CliRunner().invoke(app, ["config", "show", str(file)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("security", "is_good"),
    [("open", True), ({"open": True}, True), ({"keys_file": "/k"}, True), ("closed", False)],
)
def test_security_is_a_word_or_a_section(
    args: dict[str, Any], security: object, is_good: bool
) -> None:
    document = {**FULL, "security": security}
    assert is_valid(document, args) is is_good
    if is_good:
        assert parse_args(document).security.is_protected
    else:
        with pytest.raises(ConfigError, match=r"args\.security: .*must be open, or a mapping"):
            parse_args(document)
