"""Examines this machine, in bounded time; :mod:`router.ops.doctor.doctor` judges the findings."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from cluster.errors import CheckpointMissingError, ExpertMeshError
from cluster.memory import memory
from cluster.native import native
from cluster.processor import num_cpus
from cluster.tls import ray_is_encrypted
from experts.checkpoint.mixture import is_mixture, open_mixture
from experts.checkpoint.stored import resolve_folder
from router.config.deployment import (
    AppConfig,
    parse_deployment,
    read_file,
)
from router.config.models import ModelConfig
from router.ops.doctor import doctor, machine
from router.ops.doctor.access import check_encryption, check_token
from router.ops.doctor.check import Check
from router.ops.doctor.devices import Devices, Gpu, check_devices
from router.ops.doctor.doctor import Installed
from router.ops.doctor.needs import Needs, Size, needs_of
from router.ops.doctor.ports import ports_of, taken_ports
from router.ops.doctor.running_ray import RunningRay, look_at, raylets, target_of, temp_folder
from router.ops.plan.deployment import read_tenants
from router.ops.plan.devices import Tenant
from router.ops.plan.source import find_model
from router.security.token_file import token_exposure, token_is_used
from router.serve.options import completed
from router.served import check_file

TORCH_TIMEOUT_S = 60.0
_ASK_TORCH = """
import json, torch
kind = torch.accelerator.current_accelerator(check_available=True)
module = None if kind is None else torch.get_device_module(kind)
name = getattr(module, "get_device_name", lambda i: f"{kind.type} {i}")
properties = getattr(module, "get_device_properties", lambda i: None)
memory = lambda i: getattr(properties(i), "total_memory", 0)
count = 0 if kind is None else torch.accelerator.device_count()
print(json.dumps([torch.__version__, [[name(i), memory(i)] for i in range(count)]]))
"""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A completed deployment file, and the models of its applications by id.

    ``tenants`` are its processes on GPUs.
    """

    document: Mapping[str, Any]
    applications: tuple[tuple[AppConfig, dict[str, Size]], ...]
    tenants: tuple[Tenant, ...] = ()

    @property
    def needs(self) -> Needs:
        """The memory that the deployment takes."""
        return needs_of(self.applications)

    @property
    def has_tls(self) -> bool:
        """Whether any application has ``experts.tls``."""
        return any(config.experts.tls is not None for config, _ in self.applications)


def read_deployment(file: Path) -> Deployment:
    """Read a checked deployment file and the sizes of its models.

    The settings of Serve are filled in. Raises :class:`CheckpointMissingError` when this machine
    lacks the checkpoint of a model.
    """
    document = read_file(file)
    applications = tuple(
        (config, {model.id: _size_of(model) for model in config.models})
        for _, config in parse_deployment(document, file)
    )
    return Deployment(completed(document), applications, read_tenants(file))


def _size_of(model: ModelConfig) -> Size:
    folder = resolve_folder(model.path)
    if is_mixture(folder):
        return open_mixture(folder).num_bytes
    return find_model(str(folder), model.dtype)


def checks_of_a_start(deployment: Deployment, variables: Mapping[str, str]) -> list[Check]:
    """Check the conditions of a ``serve run`` that starts a Ray of its own."""
    ports = ports_of(deployment.document)
    tenants = deployment.tenants
    return [
        *access_checks(deployment.has_tls, None, variables),
        *([check_devices(find_devices(), tenants)] if tenants else []),
        *doctor.check_ports([port.number for port in ports], taken_ports(ports)),
        _temp_folder(variables),
        doctor.check_memory(memory(), deployment.needs),
    ]


def access_checks(
    has_tls: bool, running: RunningRay | None, variables: Mapping[str, str]
) -> list[Check]:
    """Check who reaches a start; without a ``running`` cluster it makes a Ray of its own.

    Such a Ray has a token unless ``variables`` turn it off. ``has_tls`` says whether any
    application has ``experts.tls``.
    """
    if running is not None:
        num_nodes, has_token = running.num_nodes or 0, running.has_token
    else:
        num_nodes, has_token = 1, token_is_used(variables)
    return [
        check_token(has_token, token_exposure(variables)),
        check_encryption(num_nodes, ray_is_encrypted(variables), has_tls),
    ]


def examine(file: Path | None, variables: Mapping[str, str] = os.environ) -> list[Check]:
    """Run all checks of ``expertmesh doctor``; without a file, only of this machine."""
    target = target_of(None, variables)
    deployment, file_checks = _check_file(file)
    running = None if target is None else look_at(target)
    tenants = () if deployment is None else deployment.tenants
    found = [
        *doctor.check_versions(find_installed()),
        doctor.check_native(native is not None),
        check_devices(find_devices(), tenants, joins=target is not None),
        doctor.check_memory(memory(), None if deployment is None else deployment.needs),
        doctor.check_shared_memory(machine.shared_memory_bytes()),
        _temp_folder(variables),
        doctor.check_ray(running, raylets()),
    ]
    document = {} if deployment is None else deployment.document
    has_tls = deployment is not None and deployment.has_tls
    found += access_checks(has_tls, running, variables)
    if deployment is not None:
        ports = ports_of(document)
        numbers = [port.number for port in ports]
        found += doctor.check_ports(numbers, taken_ports(ports), joins=running is not None)
    return [*found, *file_checks]


def _check_file(file: Path | None) -> tuple[Deployment | None, list[Check]]:
    if file is None:
        return None, []
    try:
        lines = check_file(file)
        return read_deployment(file), [Check("file", "ok", "; ".join(lines))]
    except CheckpointMissingError as error:
        advice = "Ignore this if another machine of the cluster has it. Else mend the path."
        return None, [Check("file", "warning", str(error), advice)]
    except ExpertMeshError as error:
        return None, [Check("file", "problem", str(error), f"Mend {file}.")]


def _temp_folder(variables: Mapping[str, str]) -> Check:
    return doctor.check_temp_folder(machine.writable_folder(temp_folder(variables)))


def find_installed() -> Installed:
    """Read the versions of Python and of all required packages, without an import of them."""
    try:
        needed = metadata("expertmesh")["Requires-Python"] or ">=3"
        wanted = [Requirement(text) for text in requires("expertmesh") or []]
    except PackageNotFoundError:
        return Installed(platform.python_version(), ">=3", {}, ())
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    packages = {need.name: _version(need.name) for need in wanted}
    return Installed(platform.python_version(), needed, packages, tuple(map(str, wanted)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_devices() -> Devices:
    """Ask torch for its GPUs, in a process of its own: a driver may hang or kill that process."""
    devices = Devices(num_cpus())
    try:
        version, gpus = machine.run_python(_ASK_TORCH, timeout_s=TORCH_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return replace(devices, reason=f"no answer within {TORCH_TIMEOUT_S:.0f} s")
    except ValueError as error:
        return replace(devices, reason=str(error))
    return replace(devices, torch_version=version, gpus=tuple(Gpu(*gpu) for gpu in gpus))
