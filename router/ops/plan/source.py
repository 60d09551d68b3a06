"""Finds the model of an ``expertmesh plan``, by its folder or by the name of a known model.

Of a folder it reads ``config.json`` and the headers of the weights, if there are weights.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.hub import DESCRIPTION, HubId
from experts.checkpoint.mixture import is_mixture, open_mixture
from experts.checkpoint.quantization import METHODS, quantization_of
from experts.checkpoint.stored import fetched
from router.ops.plan.plan import PlannedModel
from router.ops.plan.shape import shape_of
from router.ops.plan.sizes import format_count

DEFAULT_DTYPE = "bfloat16"


def known_models() -> dict[str, dict[str, Any]]:
    """Return the entries of ``known_models.yaml`` by the models' names in lower case."""
    text = (importlib.resources.files("router.ops.plan") / "known_models.yaml").read_text(
        encoding="utf-8"
    )
    return yaml.safe_load(text)


def find_model(name: str, dtype: str = "auto") -> PlannedModel:
    """Find a model: a folder, a folder in the ``deploy`` package, or a known model's name.

    ``dtype`` is the served dtype of its weights. ``auto`` stands for the checkpoint's dtype, or for
    bfloat16 where this version cannot serve that. Raises :class:`CheckpointError` naming the wrong
    file, and :class:`ConfigError` when there is no such model.
    """
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        allowed = ", ".join(("auto", *sorted(DTYPE_BYTES)))
        raise ConfigError(f"must be one of {allowed}; got {dtype!r:.40}", "--dtype")
    bundled = Path(str(importlib.resources.files("deploy")))
    for folder in (Path(name), bundled / name, bundled / "models" / name):
        if folder.is_dir():
            return _of_folder(folder, dtype)
    known = known_models()
    if name.lower() not in known:
        raise ConfigError(f"is neither a folder nor a known model; known: {', '.join(known)}", name)
    return _of_known(name.lower(), known[name.lower()], dtype)


def describe_hub(model: HubId) -> list[str]:
    """Return lines on a model of the hub, from its configuration and index: no weights are fetched.

    Raises :class:`CheckpointError` for a model that cannot be fetched or is not served.
    """
    folder = fetched(model, DESCRIPTION)
    planned = find_model(str(folder))
    shape = planned.shape
    index = next(iter(folder.glob("*.index.json")), None)
    stored = set() if index is None else set(read_json(index).get("weight_map", {}).values())
    files = f"{len(stored)} files of weights" if stored else "one file of weights"
    lines = [
        f"{model}: {format_count(shape.total_parameters)} parameters, "
        f"{shape.num_moe_layers} layers of {shape.num_experts} experts "
        f"(top {shape.num_experts_per_tok}), {planned.dtype}; {files}"
    ]
    return [*lines, planned.note] if planned.note else lines


def _of_folder(folder: Path, dtype: str) -> PlannedModel:
    if is_mixture(folder):
        size_mb = open_mixture(folder).num_bytes / 1e6
        raise ConfigError(
            f"is a mixture, whose files have {size_mb:.1f} MB; plan is for language models",
            str(folder),
        )
    file = folder / "config.json"
    config = read_json(file)
    shape = shape_of(config, str(file))
    if any(folder.glob("*.safetensors")):
        own, source = open_checkpoint(folder).dtype, f"config.json and headers in {folder}"
    else:
        own, source = _dtype_of(config), str(file)
    chosen = own if dtype == "auto" else dtype
    quantization = quantization_of(config, file)
    note = "" if quantization is None else _stored_note(quantization.method, chosen)
    return PlannedModel(folder.resolve().name, shape, chosen, source, note)


def _dtype_of(config: dict[str, Any]) -> str:
    """Return the dtype of a configuration, or the default where this version cannot serve it."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return dtype if dtype in DTYPE_BYTES else DEFAULT_DTYPE


def _of_known(name: str, entry: dict[str, Any], dtype: str) -> PlannedModel:
    shape = shape_of(entry["config"], f"known_models.yaml: {name}")
    chosen = DEFAULT_DTYPE if dtype == "auto" else dtype
    stored = entry.get("stored")
    note = _stored_note(stored, chosen) if stored else ""
    return PlannedModel(name, shape, chosen, entry["source"], note)


def _stored_note(stored: str, chosen: str) -> str:
    """Return a remark on weights whose stored format is not their served dtype."""
    if stored in METHODS:
        return f"stored in {stored}, dequantised when loaded; planned for {chosen}"
    return f"published in {stored}, which is not served; planned for {chosen}"
