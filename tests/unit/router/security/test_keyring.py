"""Changes of the file of keys while it is in use."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from router.security import keyring as module
from router.security.keyring import Keyring
from router.security.keys import Role
from router.security.keys_file import add_key, revoke


def looked(keyring: Keyring) -> None:
    keyring.take(keyring.changed())


def test_a_key_counts_from_its_making_to_its_revocation(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first = add_key(file, "alice", [Role.INFERENCE])
    keyring = Keyring(file)
    assert keyring.changed() is None  # it is read only when it has changed
    second = add_key(file, "bob", [Role.ADMIN])
    assert keyring.caller(second) is None
    looked(keyring)
    found = keyring.caller(second)
    assert found is not None
    assert (found.name, found.roles) == ("bob", {Role.ADMIN})
    revoke(file, "alice")
    looked(keyring)
    assert keyring.caller(first) is None
    assert keyring.caller(second) is not None


@pytest.mark.parametrize("breaks", ["removed", "opened to all", "malformed"])
def test_a_file_that_goes_wrong_leaves_the_earlier_keys_and_a_problem(
    tmp_path: Path, breaks: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.yaml"
    key = add_key(file, "alice", [Role.INFERENCE])
    keyring = Keyring(file)
    content = file.read_text()
    if breaks == "removed":
        file.unlink()
    elif breaks == "opened to all":
        file.chmod(0o644)
    else:
        file.write_text("keys: 7\n")
    with caplog.at_level(logging.ERROR, "expertmesh.security"):
        for _ in range(3):
            looked(keyring)
    assert keyring.caller(key) is not None
    assert str(file) in keyring.problem
    [record] = caplog.records  # once, not at each look
    assert "the keys from before stay in force" in record.getMessage()
    file.write_text(content)
    file.chmod(0o600)
    looked(keyring)
    assert keyring.problem == ""
    assert keyring.caller(key) is not None


def test_a_link_to_another_file_is_followed(tmp_path: Path) -> None:
    """As a mounted secret changes: its files are links that are put elsewhere."""
    with pytest.raises(ConfigError, match="cannot be read"):
        Keyring(tmp_path / "keys.yaml")
    one, two, link = (tmp_path / name for name in ("one", "two", "keys.yaml"))
    add_key(one, "alice", [Role.INFERENCE])
    key = add_key(two, "alice", [Role.INFERENCE])
    link.symlink_to(one)
    keyring = Keyring(link)
    link.unlink()
    link.symlink_to(two)
    looked(keyring)
    assert keyring.caller(key) is not None


async def test_it_follows_the_file_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    file = tmp_path / "keys.yaml"
    add_key(file, "alice", [Role.INFERENCE])
    keyring = Keyring(file)
    following = asyncio.create_task(keyring.follow())
    key = add_key(file, "bob", [Role.INFERENCE])
    while keyring.caller(key) is None:
        await asyncio.sleep(0.01)
    following.cancel()


def test_the_file_is_replaced_and_keeps_mode_owner_and_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "keys.yaml"
    add_key(real, "alice", [Role.INFERENCE])
    assert real.stat().st_mode & 0o777 == 0o600
    real.chmod(0o640)
    link.symlink_to(real)
    before = real.stat()
    add_key(link, "bob", [Role.INFERENCE])
    after = real.stat()
    assert link.is_symlink()
    assert after.st_mode == before.st_mode
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino
    assert sorted(os.listdir(tmp_path)) == ["keys.yaml", "real.yaml"]  # nothing half written
