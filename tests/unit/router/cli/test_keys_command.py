"""``expertmesh keys``: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from router.cli.app import app
from router.security.keys import NAME_RULE, read_callers


def keys(file: Path, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *words, "--file", str(file)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_new_key_is_printed_once_and_its_hash_is_kept(file: Path) -> None:
    code, key, told = keys(file, "new", "alice", "--role", "inference", "--role", "metrics")
    assert code == 0
    assert key.startswith("em-")
    assert len(key.strip()) == 46
    assert key.strip() not in told + file.read_text()
    [entry] = yaml.safe_load(file.read_text())["keys"]
    assert entry == {
        "sha256": sha256(key.strip().encode()).hexdigest(),
        "name": "alice",
        "roles": ["inference", "metrics"],
    }
    assert file.stat().st_mode & 0o777 == 0o600


def test_keys_differ_and_are_listed_by_names_and_beginnings_of_hashes(file: Path) -> None:
    first, second = (json.loads(keys(file, "new", name, "--json")[1]) for name in ("bob", "alice"))
    assert first["roles"] == second["roles"] == ["inference"]
    assert first["key"] != (key := second["key"])
    code, table, _ = keys(file, "list")
    assert code == 0
    assert "alice" in table
    assert sha256(key.encode()).hexdigest()[:12] in table
    _, entry = json.loads(keys(file, "list", "--json")[1])
    assert entry["sha256"] == sha256(key.encode()).hexdigest()


def test_a_new_key_gets_limits_and_a_second_one_of_its_name_the_same(file: Path) -> None:
    words = ["--requests-per-s", "2.5", "--tokens-per-min", "60000", "--concurrent-tokens", "9000"]
    assert keys(file, "new", "alice", *words, "--priority", "-1")[0] == 0
    assert keys(file, "new", "alice")[0] == 0
    assert keys(file, "new", "alice", *words, "--priority", "-1")[0] == 0
    assert keys(file, "new", "bob")[0] == 0
    limits = {
        "requests_per_s": 2.5, "tokens_per_min": 60000, "concurrent_tokens": 9000, "priority": -1
    }  # fmt: skip
    entries = yaml.safe_load(file.read_text())["keys"]
    assert [entry.get("limits") for entry in entries] == [limits, limits, limits, None]
    listed = json.loads(keys(file, "list", "--json")[1])
    assert listed[0]["limits"] == limits
    assert set(listed[3]["limits"].values()) == {None}
    table = keys(file, "list")[1]
    for line in ("requests_per_s 2.5", "tokens_per_min 60,000", "priority -1"):
        assert line in table


def test_a_name_or_a_hash_is_revoked(file: Path) -> None:
    first, second, third = (keys(file, "new", name)[1].strip() for name in ("a", "a", "b"))
    beginning = sha256(second.encode()).hexdigest()[:8]
    code, told, _ = keys(file, "revoke", beginning)
    assert (code, told.count("revoked: a, ")) == (0, 1)
    left = {digest.hex() for digest in read_callers(file)[0]}
    assert left == {sha256(key.encode()).hexdigest() for key in (first, third)}
    keys(file, "new", "a")
    assert len(json.loads(keys(file, "revoke", "a", "--json")[1])) == 2
    assert [caller.name for caller in read_callers(file)[0].values()] == ["b"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["new", "two words"], f"name: must be {NAME_RULE}; got 'two words'"),
        (["new", ""], f"name: must be {NAME_RULE}; got ''"),
        (["new", "alice", "--priority", "3"], "limits: the keys of alice have other limits; leave"),
        (
            ["new", "bob", "--tokens-per-min", "0"],
            "--tokens-per-min: must be greater than or equal to 1; got 0",
        ),
        (
            ["new", "bob", "--requests-per-s", "nan"],
            "--requests-per-s: must be a finite number; got nan",
        ),
        (["revoke", "nobody"], "no key has the name or hash 'nobody'; names: alice"),
        (["revoke", "abc"], "no key has the name or hash 'abc'"),
    ],
)
def test_what_is_wrong_is_refused_and_changes_nothing(
    file: Path, words: list[str], reason: str
) -> None:
    keys(file, "new", "alice")
    before = file.read_text()
    code, _, told = keys(file, *words)
    assert code == 2
    assert reason in told
    assert file.read_text() == before


def test_a_file_that_cannot_be_used_is_refused(file: Path, tmp_path: Path) -> None:
    assert keys(file, "list")[0] == 2
    keys(file, "new", "alice")
    file.chmod(0o644)
    for words in (["list"], ["new", "bob"], ["revoke", "alice"]):
        code, _, told = keys(file, *words)
        assert code == 2
        assert "may be used by other users (mode 0644)" in told
    code, _, told = keys(tmp_path / "nowhere" / "keys.yaml", "new", "alice")
    assert code == 2
    assert "cannot be written: No such file or directory" in told


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (None, 0o600, "cannot be read"),
        ("", 0o600, "must have one key"),
        ("a b", 0o600, "must have one key"),
        ("a", 0o644, "may be used by other users (mode 0644); run: chmod 600"),
    ],
)
def test_a_key_file_of_a_client_is_checked(
    tmp_path: Path, content: str | None, mode: int, reason: str
) -> None:
    file = tmp_path / "alice.key"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    result = CliRunner().invoke(app, ["status", "--api-key-file", str(file)])
    assert result.exit_code == 2
    assert f"--api-key-file: {file} {reason}" in result.stderr
