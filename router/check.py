"""``expertmesh check FILE``: what a deployment file says, checked without Ray."""

from __future__ import annotations

from pathlib import Path

from router.config import load_deployment
from router.served import ServedModel, inspect_models


def check_file(path: Path) -> list[str]:
    """Check a deployment file and its models' headers; returns a line for each thing found fine.

    Raises :class:`ConfigError` or :class:`CheckpointError` for the first thing that is wrong.
    """
    lines = []
    for name, config in load_deployment(path):
        served = inspect_models(config, f"{path}: applications.{name}.args")
        pools = config.experts.pools or ()
        kinds = f" ({', '.join(f'{pool.name}: {pool.actors}' for pool in pools)})" if pools else ""
        lines.append(
            f"application {name}: {config.experts.num_actors} expert actors{kinds}, "
            f"{config.router.replicas} routers per model, {config.gateway.replicas} gateways"
        )
        if emulated := config.experts.emulated_pools:
            lines.append(f"emulated devices, so that no answer is exact: {', '.join(emulated)}")
        lines.extend(_describe(model) for model in served)
    return lines


def _describe(model: ServedModel) -> str:
    experts = model.source.experts
    total_mb = len(experts.expert_keys()) * experts.expert_bytes / 1e6
    dtype = model.dtype if model.stored is None else f"{model.dtype} (stored as {model.stored})"
    return (
        f"model {model.id}: {model.family}, {model.num_layers} layers of {model.num_experts} "
        f"experts (top {model.num_experts_per_tok}), {dtype}, experts {total_mb:.1f} MB, "
        f"context {model.max_model_len} tokens"
    )
