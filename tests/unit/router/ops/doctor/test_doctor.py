"""What is judged of a machine from what was found of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.memory import Memory
from router.cli.app import app
from router.config.deployment import parse_args
from router.ops.doctor import doctor, probe
from router.ops.doctor.check import Check
from router.ops.doctor.doctor import Installed
from router.ops.doctor.machine import Disk
from router.ops.doctor.needs import (
    ACTOR_BYTES,
    GATEWAY_BYTES,
    RAY_AND_SERVE_BYTES,
    ROUTER_BYTES,
    Needs,
    needs_of,
)
from router.ops.doctor.ports import Port, TakenPort
from router.ops.doctor.running_ray import RunningRay, Target
from router.ops.plan.source import find_model

GB = 10**9
FOLDER = Path("/tmp/ray")
NEEDS = Needs(3 * GB, 2 * GB, GB)


def installed(**packages: str | None) -> Installed:
    requirements = ("ray[serve]<3,>=2.60", "grpcio>=1.83.2")
    found = {"ray": "2.60.0", "grpcio": "1.83.2"} | packages
    return Installed("3.11.7", ">=3.11", found, requirements)


@pytest.mark.parametrize("version", ["2.59.9", "3.0.0", None])
def test_a_package_that_is_too_old_too_new_or_absent_is_a_problem(version: str | None) -> None:
    wrong, rest = doctor.check_versions(installed(ray=version))
    assert (wrong.name, wrong.level) == ("ray", "problem")
    assert "needed: <3,>=2.60" in wrong.found
    assert (version or "not installed") in wrong.found
    assert wrong.advice == "pip install 'ray[serve]<3,>=2.60'"
    assert rest.found == "python 3.11.7, grpcio 1.83.2"


def test_versions_within_their_bounds_are_one_line_and_an_old_python_is_a_problem() -> None:
    [check] = doctor.check_versions(installed())
    assert check == Check("versions", "ok", "python 3.11.7, ray 2.60.0, grpcio 1.83.2")
    checks = doctor.check_versions(Installed("3.10.1", ">=3.11", {}, ()))
    problems = [("python", "problem"), ("expertmesh", "problem")]
    assert [(check.name, check.level) for check in checks] == [*problems, ("versions", "ok")]


def memory_of(available: int, needs: Needs | None = NEEDS) -> Check:
    return doctor.check_memory(Memory(32 * GB, available), needs)


def folder_of(free: int, reason: str = "", folder: Path = FOLDER) -> Check:
    return doctor.check_temp_folder(Disk(folder, 100 * GB, free, reason))


def ray_of(reason: str, address: str = "h:1") -> Check:
    return doctor.check_ray(RunningRay(Target(address, "F"), reason), [7])


NEEDED = "about 6.00 GB needed (experts 3.00 GB"


@pytest.mark.parametrize(
    ("check", "level", "found", "advice"),
    [
        (memory_of(20 * GB), "ok", NEEDED, ""),
        (memory_of(7 * GB), "warning", NEEDED, "add machines to Ray"),
        (memory_of(6 * GB), "warning", NEEDED, "add machines to Ray"),
        (memory_of(6 * GB - 1), "problem", NEEDED, "add machines to Ray"),
        (memory_of(1, None), "ok", "free", ""),
        (doctor.check_shared_memory(None), "ok", "not on this system", ""),
        (doctor.check_shared_memory(64 << 20), "warning", "67.1 MB free", "--shm-size"),
        (doctor.check_shared_memory(2 * GB), "ok", "2.00 GB free", ""),
        (folder_of(50 * GB), "ok", "/tmp/ray: 50.0 GB free", ""),
        (folder_of(4 * GB), "warning", "less than 5 % of the disk", "RAY_TMPDIR"),
        (folder_of(GB // 20), "problem", "50.0 MB free", "RAY_TMPDIR"),
        (folder_of(0, "is full"), "problem", "/tmp/ray is full", "RAY_TMPDIR"),
        (folder_of(GB, "", Path("/tmp/" + "x" * 60)), "problem", "ters too long", "RAY_TMPDIR"),
        (doctor.check_ray(None, []), "ok", "none runs", ""),
        (doctor.check_ray(None, [7, 9]), "warning", "raylet pid 7, 9", "`ray stop`"),
        (ray_of(""), "ok", "joins h:1", ""),
        (ray_of("", "ray://h:1"), "ok", "joins ray://h:1 (named by F)", ""),
        (ray_of("does not answer"), "problem", "does not answer", "unset RAY_ADDRESS"),
        (ray_of("is Ray 2.9"), "problem", "is Ray 2.9", "other versions"),
        (doctor.check_native(True), "ok", "built", ""),
        (doctor.check_native(False), "warning", "was not built", "C compiler"),
    ],
)
def test_each_finding_has_its_level_and_what_to_do(
    check: Check, level: str, found: str, advice: str
) -> None:
    assert check.level == level
    assert found in check.found
    assert advice in check.advice
    assert bool(check.advice) == (level != "ok")


def test_needs_are_the_sum_of_the_parts() -> None:
    model = find_model("mesh-tiny")
    config = parse_args(
        {
            "models": [{"id": "a", "path": "x"}, {"id": "b", "path": "x", "max_model_len": 100}],
            "experts": {"actors": 3, "min_copies": 2},
            "router": {"replicas": 2, "max_batch_size": 4},
            "gateway": {"replicas": 5},
        }
    )
    needs = needs_of([(config, {"a": model, "b": model})])
    shape = model.shape
    assert needs.experts_bytes == 2 * 2 * 32 * shape.expert_parameters * 4
    cached = 4 * (1024 + 100) * shape.cache_values_per_token  # tokens of both caches
    assert needs.routers_bytes == 2 * 4 * (2 * shape.router_parameters + cached)
    actors, routers, gateways = 3 * ACTOR_BYTES, 4 * ROUTER_BYTES, 5 * GATEWAY_BYTES
    assert needs.processes_bytes == RAY_AND_SERVE_BYTES + actors + routers + gateways
    assert needs.total_bytes == sum(
        (needs.experts_bytes, needs.routers_bytes, needs.processes_bytes)
    )


def test_experts_on_gpus_take_no_host_memory_and_pools_count_by_their_budgets() -> None:
    model = find_model("mesh-tiny")
    alone = {"models": [{"id": "a", "path": "x"}], "experts": {"num_gpus": 1}}
    assert needs_of([(parse_args(alone), {"a": model})]).experts_bytes == 0
    pools = [
        {"name": "gpu", "actors": 1, "num_gpus": 1, "memory_budget_bytes": 60},
        {"name": "cpu", "actors": 2, "memory_budget_bytes": 10},
    ]
    args = {"models": [{"id": "a", "path": "x"}], "experts": {"pools": pools, "min_copies": 2}}
    needs = needs_of([(parse_args(args), {"a": model})])
    assert needs.experts_bytes == 2 * 32 * model.shape.expert_parameters * 4 // 4
    processes = RAY_AND_SERVE_BYTES + 3 * ACTOR_BYTES + ROUTER_BYTES + GATEWAY_BYTES
    assert needs.processes_bytes == processes


def test_each_taken_port_is_a_problem_and_free_ones_are_one_line() -> None:
    port = Port(8000, "127.0.0.1", "HTTP", "gateway.listen.http_port")
    [problem] = doctor.check_ports([8000, 9000], [TakenPort(port, "taken by nginx (pid 3)")])
    assert problem == Check(
        "port 8000",
        "problem",
        "for HTTP: taken by nginx (pid 3)",
        "End that process, or set gateway.listen.http_port to another port.",
    )
    [joined] = doctor.check_ports([8000], [TakenPort(port, "taken by ray (pid 3)")], joins=True)
    assert joined.level == "warning"
    assert doctor.check_ports([8000, 9000], []) == [Check("ports", "ok", "8000, 9000 are free")]


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_command_shows_the_checks_and_fails_for_problems_alone(
    level: doctor.Level, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Check("port 8000", level, "for [HTTP]: taken", "End it.")
    monkeypatch.setattr(probe, "examine", lambda file: [check])
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == code
    for words in ("port 8000", level, "for [HTTP]: taken", "End it."):
        assert words in table.stdout
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {
        "ok": code == 0,
        "checks": [
            {"name": "port 8000", "level": level, "found": check.found, "advice": "End it."}
        ],
    }
