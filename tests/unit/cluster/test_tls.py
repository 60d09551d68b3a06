"""TLS files are checked at the start, and changed files come into use with new connections."""

from __future__ import annotations

import logging
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
from ray.serve.exceptions import RayServeException

from cluster import tls
from cluster.errors import ConfigError
from cluster.tls import ray_is_encrypted, require_ray_tls
from router.app import application
from tests.unit.certificates import Authority, new_authority, write

LIMIT_S = 60.0
NOW = datetime.now(UTC)
PAST = NOW - timedelta(days=1)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "ours")


class Connection:
    """Both ends of a new connection."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        """Connect; raises ``ssl.SSLError`` where one of them refuses the other."""
        for_server, for_client = socket.socketpair()
        for end in (for_server, for_client):
            end.settimeout(LIMIT_S)
        with ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(server.wrap_socket, for_server, server_side=True)
            try:
                self.client = client.wrap_socket(for_client)
            except ssl.SSLError:
                accepting.exception(LIMIT_S)
                for_server.close()
                raise
            self.server = accepting.result(LIMIT_S)

    def serial(self) -> str:
        """Return the number of the certificate that the server has shown."""
        certificate = self.client.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])

    def echoes(self) -> bool:
        """Return whether bytes go both ways."""
        self.client.sendall(b"there")
        there = self.server.recv(5)
        self.server.sendall(b"back")
        return (there, self.client.recv(4)) == (b"there", b"back")

    def close(self) -> None:
        self.client.close()
        self.server.close()


def serial(ours: Authority) -> str:
    connection = Connection(ours.server, ours.client)
    found = connection.serial()
    connection.close()
    return found


def test_changed_files_come_into_use_with_new_connections_and_running_ones_go_on(
    ours: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.0)
    caplog.set_level(logging.INFO, "expertmesh.tls")
    running = Connection(ours.server, ours.client)
    before = running.serial()
    assert serial(ours) == before
    ours.replace()
    after = serial(ours)
    assert after != before
    assert serial(ours) == after
    assert running.echoes()
    running.close()
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]  # one each side


def test_a_peer_with_the_former_authority_alone_is_refused_after_the_change(
    ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.0)
    former = new_authority(tmp_path / "former", ours.ca)
    Connection(ours.server, former.client).close()
    ours.replace()
    with pytest.raises(ssl.SSLCertVerificationError):
        Connection(ours.server, former.client)
    with pytest.raises(ssl.SSLCertVerificationError):
        Connection(former.server, ours.client)


def test_files_are_looked_at_at_most_once_a_second(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now_s, time=time.time)
    monkeypatch.setattr(tls, "time", clock)
    looks: list[str] = []
    stamp_of = tls.stamp_of
    monkeypatch.setattr(tls, "stamp_of", lambda path: looks.append(path) or stamp_of(path))
    now_s += 2.0
    before = serial(ours)
    ours.replace()
    looks.clear()
    now_s += 0.9
    assert [serial(ours) for _ in range(3)] == [before] * 3
    assert looks == []
    now_s += 0.2
    after = [serial(ours) for _ in range(3)]
    assert len(set(after)) == 1
    assert after[0] != before
    # Once for each side, which look at the same time.
    assert sorted(looks) == sorted([*astuple(ours.files)] * 2)


def _other_key(ours: Authority) -> None:
    ours.ca.issue_cert("other.example").private_key_pem.write_to_path(ours.files.key)


def _expired(ours: Authority) -> None:
    write(ours.files, ours.ca, ends_at=PAST)


def _foreign(ours: Authority) -> None:
    trustme.CA().cert_pem.write_to_path(ours.files.authority)


def _half_written(ours: Authority) -> None:
    Path(ours.files.certificate).write_bytes(b"-----BEGIN CERTIFICATE-----\nMIIB")


def _gone(ours: Authority) -> None:
    Path(ours.files.key).unlink()


def _no_authority(ours: Authority) -> None:
    Path(ours.files.authority).write_bytes(b"no certificate")


SPOILERS = [_other_key, _expired, _foreign, _half_written, _gone, _no_authority]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_changed_files_that_are_of_no_use_are_told_once_and_the_earlier_ones_stay(
    ours: Authority,
    spoil: Callable[[Authority], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.0)
    caplog.set_level(logging.INFO, "expertmesh.tls")
    before = serial(ours)
    spoil(ours)
    assert [serial(ours) for _ in range(3)] == [before] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]  # one each side
    assert "experts.tls." in caplog.text
    caplog.clear()
    write(ours.files, ours.ca)
    assert serial(ours) != before
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]


@pytest.mark.parametrize(
    ("spoil", "field", "words"),
    [
        (_other_key, "certificate", "cert.pem does not fit its key, "),
        (_expired, "certificate", "cert.pem is refused by TLS: certificate has expired"),
        (_foreign, "certificate", "cert.pem is refused by TLS: unable to get local issuer"),
        (_half_written, "certificate", "cannot be used: "),
        (_gone, "key", "no such file: "),
        (_no_authority, "authority", "cannot be used: "),
    ],
)
def test_files_that_are_of_no_use_at_the_start_are_refused_by_name(
    ours: Authority, spoil: Callable[[Authority], None], field: str, words: str
) -> None:
    spoil(ours)
    for make in (ours.files.server_context, ours.files.client_context):
        with pytest.raises(ConfigError) as caught:
            make("args.experts.tls")
        assert words in caught.value.message
        assert caught.value.field == f"args.experts.tls.{field}"


def test_several_threads_connect_while_files_change(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_S", 0.0)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            serials = [pool.submit(serial, ours) for _ in range(8)]
            assert len({found.result(LIMIT_S) for found in serials}) == 1
            write(ours.files, ours.ca)


@pytest.mark.parametrize(
    ("value", "is_encrypted"),
    [("1", True), ("true", True), ("True", True), ("0", False), ("", False), ("no", False)],
)
def test_rays_variable_is_read_as_ray_reads_it(
    value: str, is_encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", value)
    assert ray_is_encrypted() == is_encrypted
    assert not ray_is_encrypted({})
    if is_encrypted:
        require_ray_tls("here")
        return
    with pytest.raises(ConfigError, match="here: needs RAY_USE_TLS=1"):
        require_ray_tls("here")


def test_an_application_with_tls_is_not_built_where_rays_calls_are_plain(
    ours: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {
        "models": [{"id": "mesh-tiny", "path": "models/mesh-tiny"}],
        "experts": {"tls": asdict(ours.files)},
    }
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(RayServeException, match=r"args\.experts\.tls: needs RAY_USE_TLS=1"):
        application(args)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert application(args) is not None
