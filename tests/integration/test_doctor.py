"""``expertmesh doctor`` and the checks of a start, beside a Ray that really runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.shipped import shipped_document
from router.ops.doctor import running_ray
from router.ops.doctor.doctor import check_ray
from router.ops.doctor.running_ray import Target, look_at, raylets
from tests.cluster_fixture import ServedCluster
from tests.integration.test_status_and_cli import run


@pytest.fixture
def target(served: ServedCluster, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The address of the Ray that serves, as if ``ray start`` had written it."""
    import ray

    monkeypatch.setattr(running_ray, "ASK_TIMEOUT_S", 240.0)  # a busy machine takes longer
    return Target(ray.get_runtime_context().gcs_address, "a file")


def test_the_ray_that_runs_can_be_joined(target: Target) -> None:
    found = look_at(target)
    assert found.reason == ""
    assert found.num_nodes == 1
    assert found.has_token == (os.environ.get("RAY_AUTH_MODE") == "token")
    assert check_ray(found, []).level == "ok"


def test_a_ray_that_wants_a_token_is_said_to_want_it(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    found = look_at(replace(target, named_by="RAY_ADDRESS"))
    assert found.reason == "asks for Ray's token, and this user's is another or none"
    assert check_ray(found, []).level == "problem"


def test_its_processes_and_its_ports_are_seen(served: ServedCluster, tmp_path: Path) -> None:
    assert raylets()
    http_port = int(served.http_url.rpartition(":")[2])
    grpc_port = int(served.grpc_address.rpartition(":")[2])
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(shipped_document(http_port, grpc_port)))
    done = run("doctor", str(file), "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    levels = {check["name"]: check["level"] for check in told["checks"]}
    assert not told["ok"]
    assert levels["ray"] == "warning"
    for port in (http_port, grpc_port):
        assert levels[f"port {port}"] == "problem"
    assert (levels["versions"], levels["file"]) == ("ok", "ok")
