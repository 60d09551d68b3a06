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


def test_versions_within_their_bounds_are_one_line() -> None:
    [check] = doctor.check_versions(installed())
    assert check == Check("versions", "ok", "python 3.11.7, ray 2.60.0, grpcio 1.83.2")


@pytest.mark.parametrize("version", ["2.59.9", "3.0.0", None])
def test_a_package_that_is_too_old_too_new_or_absent_is_a_problem(version: str | None) -> None:
    wrong, rest = doctor.check_versions(installed(ray=version))
    assert (wrong.name, wrong.level) == ("ray", "problem")
    assert "needed: <3,>=2.60" in wrong.found
    assert (version or "not installed") in wrong.found
    assert wrong.advice == "pip install 'ray[serve]<3,>=2.60'"
    assert rest.found == "python 3.11.7, grpcio 1.83.2"


def test_an_old_python_and_a_package_that_is_not_installed_are_problems() -> None:
    checks = doctor.check_versions(Installed("3.10.1", ">=3.11", {}, ()))
    assert [(check.name, check.level) for check in checks] == [
        ("python", "problem"),
        ("expertmesh", "problem"),
        ("versions", "ok"),
    ]


@pytest.mark.parametrize(
    ("available", "level"),
    [(20 * GB, "ok"), (7 * GB, "warning"), (6 * GB, "warning"), (6 * GB - 1, "problem")],
)
def test_memory_is_compared_with_what_is_needed(available: int, level: str) -> None:
    check = doctor.check_memory(Memory(32 * GB, available), NEEDS)
    assert check.level == level
    assert "about 6.00 GB needed (experts 3.00 GB" in check.found
    assert doctor.check_memory(Memory(32 * GB, available), None).level == "ok"


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


@pytest.mark.parametrize(("free", "level"), [(None, "ok"), (64 << 20, "warning"), (2 * GB, "ok")])
def test_little_shared_memory_is_a_warning(free: int | None, level: str) -> None:
    assert doctor.check_shared_memory(free).level == level


@pytest.mark.parametrize(
    ("disk", "level", "words"),
    [
        (Disk(FOLDER, 100 * GB, 50 * GB), "ok", "/tmp/ray: 50.0 GB free"),
        (Disk(FOLDER, 100 * GB, 4 * GB), "warning", "less than 5 % of the disk"),
        (Disk(FOLDER, 100 * GB, GB // 20), "problem", "50.0 MB free"),
        (Disk(FOLDER, 100 * GB, 0, "is full"), "problem", "/tmp/ray is full"),
        (Disk(Path("/tmp/" + "x" * 60), GB, GB), "problem", "characters too long"),
    ],
)
def test_rays_folder_needs_room_and_a_short_name(disk: Disk, level: str, words: str) -> None:
    check = doctor.check_temp_folder(disk)
    assert check.level == level
    assert words in check.found
    assert ("RAY_TMPDIR" in check.advice) == (level != "ok")


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


@pytest.mark.parametrize(
    ("running", "raylets", "level", "words"),
    [
        (None, [], "ok", "none runs"),
        (None, [7, 9], "warning", "raylet pid 7, 9"),
        (RunningRay(Target("h:1", "F"), "", 1), [7], "ok", "joins h:1"),
        (RunningRay(Target("ray://h:1", "F"), ""), [], "ok", "joins ray://h:1 (named by F)"),
        (RunningRay(Target("h:1", "F"), "does not answer"), [], "problem", "does not answer"),
        (RunningRay(Target("h:1", "F"), "is Ray 2.9"), [], "problem", "is Ray 2.9"),
    ],
)
def test_the_ray_that_a_start_would_join_is_judged(
    running: RunningRay | None, raylets: list[int], level: str, words: str
) -> None:
    check = doctor.check_ray(running, raylets)
    assert check.level == level
    assert words in check.found
    assert bool(check.advice) == (level != "ok")


def test_native_code_that_was_not_built_is_told_with_what_to_do() -> None:
    assert doctor.check_native(True).level == "ok"
    missing = doctor.check_native(False)
    assert (missing.level, "compiler" in missing.advice) == ("warning", True)


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
