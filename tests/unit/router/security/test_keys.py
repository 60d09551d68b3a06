"""The file of keys: what it means, what is refused without being shown, and its changes."""

from __future__ import annotations

import asyncio
import logging
import os
from hashlib import sha256
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from router.security import keyring as module
from router.security.keyring import Keyring
from router.security.keys import Caller, Role, digest_of, read_callers
from router.security.keys_file import add_key, revoke
from router.security.limits import KeyLimits

PLAIN = "em-canary-that-nobody-may-see"
HASH = sha256(PLAIN.encode()).hexdigest()
LIMITED = f"keys:\n- {{sha256: {HASH}, name: alice, roles: [inference], limits: LIMITS}}\n"
GOOD = f"keys:\n- {{sha256: {HASH}, name: alice, roles: [inference, metrics]}}\n"


def written(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file = folder / "keys.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    file.chmod(mode)
    return file


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_key_is_known_by_its_hash(tmp_path: Path, mode: int) -> None:
    callers, _ = read_callers(written(tmp_path, GOOD, mode))
    assert callers == {digest_of(PLAIN): Caller("alice", frozenset({Role.INFERENCE, Role.METRICS}))}
    assert next(iter(callers)).hex() == HASH


def test_keys_of_one_name_share_its_limits(tmp_path: Path) -> None:
    limits = "{requests_per_s: 0.5, tokens_per_min: 6000, concurrent_tokens: 900, priority: -3}"
    first = LIMITED.replace("LIMITS", limits)
    second = first.replace(HASH, "'" + "0" * 64 + "'").removeprefix("keys:\n")
    callers, _ = read_callers(written(tmp_path, first + second))
    expected = KeyLimits(
        requests_per_s=0.5, tokens_per_min=6000, concurrent_tokens=900, priority=-3
    )
    assert [caller.limits for caller in callers.values()] == [expected, expected]
    assert read_callers(written(tmp_path, "keys: []\n"))[0] == {}
    other = second.replace("6000", "6001")
    reason = r"keys\[1\]\.limits differ from those of keys\[0\], of the same name"
    with pytest.raises(ConfigError, match=reason) as refused:
        read_callers(written(tmp_path, first + other))
    assert "alice" not in str(refused.value)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (PLAIN, r"keys\[0\]\.limits: must be a mapping"),
        (f"{{{PLAIN}: 1}}", r"limits has an unknown key; allowed are requests_per_s"),
        (f"{{priority: {PLAIN}}}", r"limits\.priority: Input should be a valid integer"),
        ("{requests_per_s: 0}", r"limits\.requests_per_s: Input should be greater than 0"),
        ("{requests_per_s: .inf}", r"limits\.requests_per_s: Input should be a finite number"),
        ("{tokens_per_min: 0}", r"limits\.tokens_per_min: Input should be greater than or equal"),
        ("{tokens_per_min: 1.5}", r"limits\.tokens_per_min: Input should be a valid integer"),
        ("{priority: 9223372036854775808}", r"limits\.priority: Input should be less than or eq"),
    ],
)
def test_limits_that_are_wrong_are_refused_without_their_content(
    tmp_path: Path, limits: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        read_callers(written(tmp_path, LIMITED.replace("LIMITS", limits)))
    assert PLAIN not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file: must be a mapping"),
        (f"{PLAIN}: alice\n", "keys: Field required"),
        (f"{GOOD}{PLAIN}: alice\n", "the file has an unknown key; allowed are keys"),
        (f"keys: {PLAIN}\n", "keys: must be a list"),
        (f"keys: [{PLAIN}]\n", r"keys\[0\]: must be a mapping"),
        (GOOD.replace(HASH, PLAIN), r"keys\[0\]\.sha256 must be the SHA-256 of a key in 64"),
        (GOOD.replace("alice", f"'{PLAIN} !'"), r"keys\[0\]\.name must be 1 to 64 letters"),
        (GOOD.replace("[inference, metrics]", "[]"), r"keys\[0\]\.roles: .*at least 1"),
        (GOOD.replace("metrics", PLAIN), r"keys\[0\]\.roles\[1\]: Input should be 'inference'"),
        (GOOD.replace("roles:", f"{PLAIN}: 1, roles:"), r"keys\[0\] has an unknown key; allowed"),
        (GOOD + GOOD.removeprefix("keys:\n"), r"keys\[1\]\.sha256 appears twice"),
        (f"keys: [{PLAIN}\n", "is not YAML at line 2, column 1"),
        (f"keys: !!python/object:os.system {PLAIN}\n", "is not YAML at line 1, column 7"),
        (GOOD.encode() + b"\xff", "is not UTF-8"),
        ("x" * (1024 * 1024 + 1), "has 1048577 bytes, at most 1048576 are allowed"),
    ],
)
def test_a_file_that_is_wrong_is_refused_without_its_content(
    tmp_path: Path, text: str | bytes, reason: str
) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_callers(file)
    assert refused.value.field == "security.keys_file"
    assert str(file) in str(refused.value)
    assert PLAIN not in str(refused.value)
    assert refused.value.__cause__ is None  # a cause would be logged with the content


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o601])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=rf"by other users \(mode {mode:04o}\); run: chmod"):
        read_callers(written(tmp_path, GOOD, mode))


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_callers(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_callers(tmp_path)


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
