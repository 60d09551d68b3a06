"""Reads the processes on devices of a deployment file, from its models' headers."""

from __future__ import annotations

from pathlib import Path

from experts.checkpoint.stored import resolve_folder
from router.config.deployment import AppConfig, load_deployment
from router.ops.plan.devices import Tenant, tenants_of, wants_devices
from router.ops.plan.source import find_model
from router.served import ServedModel, headers_alone, inspect_models


def is_deployment(name: str) -> bool:
    """Return whether a name is that of a deployment file, by its ending."""
    return Path(name).suffix in (".yaml", ".yml")


def read_tenants(file: Path) -> tuple[Tenant, ...]:
    """Return the processes on devices of all applications of a file, the routers first.

    Raises :class:`ConfigError` or :class:`CheckpointError` for a wrong file or checkpoint.
    """
    tenants = [
        tenant
        for name, config in load_deployment(file)
        if wants_devices(config)
        for tenant in _tenants_of(config, f"{file}: applications.{name}.args")
    ]
    return tuple(sorted(tenants, key=lambda tenant: tenant.cache_token_bytes == 0))


def _tenants_of(config: AppConfig, where: str) -> tuple[Tenant, ...]:
    served = inspect_models(config, where, identify=headers_alone)
    models = {
        model.id: find_model(str(resolve_folder(model.path)), model.dtype)
        for model in served
        if isinstance(model, ServedModel)
    }
    return tenants_of(config, served, models)
