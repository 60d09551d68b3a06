"""One expert a layer as a plain dense model, which transformers loads.

The classes that have a plain feed-forward layer in the place of the mixture: Mistral for Mixtral,
Qwen3 for Qwen3-MoE, and DeepSeek's own, whose layers may all be dense. A shared expert becomes a
part of the layer. Layers narrower than the widest get neurons of zeros, which add nothing.

Dimension letters: I neurons, H hidden size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from cluster.errors import CheckpointError, ConfigError
from cluster.wire.tensors import from_array
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.expert_weights import read_tensor
from experts.families.base import Config
from router.observability.progress import OnProgress
from workshop.convert.plan import STORED, Found, Plan, plan_of
from workshop.convert.source import Entry, MadeTensors, Source, Take
from workshop.folders.as_mixture import EXPERT_PARTS
from workshop.folders.making import Rows
from workshop.folders.merge.likeness import DOWN
from workshop.folders.rewritten import NewTensors, files_of, gate_tensors, stored_dtype

_FFN = re.compile(rf"model\.layers\.(\d+)\.mlp\.({'|'.join(EXPERT_PARTS)})\.weight")
_SHARED = "shared_experts"
_OF_MIXTURES = (
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
    "num_experts", "num_experts_per_tok", "num_local_experts", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "quantization_config",
)  # fmt: skip


DENSE_CLASSES = {
    "mixtral": ("MistralForCausalLM", "mistral"),
    "qwen3_moe": ("Qwen3ForCausalLM", "qwen3"),
    "deepseek_v2": None,
    "deepseek_v3": None,
}
"""By family: the class of its dense models and their ``model_type``, or ``None`` for its own."""
WITHOUT_DENSE = {
    "qwen2_moe": "Qwen2 has no gated shared expert",
    "olmoe": "no class has its norms with a plain layer",
    "dbrx": "no class has its clipped attention with a plain layer",
    "gpt_oss": "no class has its sinks and clamps with a plain layer",
    "grok-1": "transformers has no class for it",
    "grok": "transformers has no class for it",
}
"""Why a family has no dense model."""


def check_dense(checkpoint: Checkpoint) -> None:
    """Raise ``ConfigError`` for a family without a dense class in transformers."""
    family = checkpoint.family.model_type
    if family not in DENSE_CLASSES:
        known = ", ".join(DENSE_CLASSES)
        raise ConfigError(
            f"{family} has no dense class ({WITHOUT_DENSE[family]}); possible: {known}", "--dense"
        )


def dense_plan(checkpoint: Checkpoint, expert: NewTensors, max_shard_bytes: int) -> Plan:
    """Return the plan of the dense model; ``expert`` has a single expert in each layer.

    Its output is scaled already. Raises ``ConfigError`` as :func:`check_dense`.
    """
    check_dense(checkpoint)
    tensors = _DenseTensors(checkpoint, expert)
    file = checkpoint.folder / "config.json"
    config = _dense_config(checkpoint.family.model_type, read_json(file), tensors.width)
    made = MadeTensors(tensors.entries, tensors.make)
    source = Source("dense", checkpoint.folder, file, config, made, files_of(checkpoint))
    found: list[Found] = [(name, entry.shape, Take(name)) for name, entry in made.entries.items()]
    return plan_of(source, found, STORED, max_shard_bytes)


def _dense_config(family: str, config: Config, width: int) -> Config:
    """Return the dense configuration of a mixture's; the widest layer has ``width`` neurons."""
    dense_class = DENSE_CLASSES[family]
    if dense_class is None:
        changed = {key: value for key, value in config.items() if key != "quantization_config"}
        if "num_nextn_predict_layers" in changed:
            changed["num_nextn_predict_layers"] = 0
        changed["first_k_dense_replace"] = config["num_hidden_layers"]
        return changed | {"intermediate_size": width}
    architecture, model_type = dense_class
    changed = {key: value for key, value in config.items() if key not in _OF_MIXTURES}
    changed |= {"architectures": [architecture], "model_type": model_type}
    if family == "qwen3_moe" and config.get(
        "use_sliding_window"
    ):  # in Qwen3-MoE all layers have the window
        changed |= {"layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    return changed | {"intermediate_size": width}


class _DenseTensors:
    """The tensors of the dense model, whose layers have ``width`` neurons."""

    def __init__(self, checkpoint: Checkpoint, expert: NewTensors) -> None:
        self._checkpoint = checkpoint
        self._expert = expert
        shape = checkpoint.shape
        self._old = checkpoint.family.dense_tensors(checkpoint.config)
        gates = {name for layer_id in shape.layers for name in gate_tensors(checkpoint, layer_id)}
        layers = range(checkpoint.config["num_hidden_layers"])
        self.width = max(self._num_neurons(layer_id) for layer_id in layers)
        self.entries = {
            name: Entry(found, stored_dtype(checkpoint, name))
            for name, found in self._old.items()
            if name not in gates and f".{_SHARED}." not in name and not _FFN.fullmatch(name)
        }
        for layer_id in layers:
            for index, part in enumerate(EXPERT_PARTS):
                sizes = (shape.hidden_size, self.width)
                self.entries[f"model.layers.{layer_id}.mlp.{part}.weight"] = Entry(
                    sizes if index == DOWN else sizes[::-1], checkpoint.dtype
                )

    def make(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        match = _FFN.fullmatch(name)
        if match is None:
            return from_array(read_tensor(self._checkpoint, name, self._checkpoint.dtype))
        return self._feed_forward(int(match[1]), EXPERT_PARTS.index(match[2]))

    def _feed_forward(self, layer_id: int, index: int) -> torch.Tensor:
        """Return a matrix of a layer: its expert and its shared expert, or its own."""
        parts = []
        if layer_id in self._checkpoint.shape.layers:
            parts.append(self._expert.matrix(layer_id, 0, index))
        stored = self._stored(layer_id, index)
        if stored is not None:
            parts.append(read_tensor(self._checkpoint, stored, "float32").astype(np.float32))
        joined = torch.from_numpy(np.concatenate(parts, axis=1 if index == DOWN else 0))
        missing = self.width - joined.shape[1 if index == DOWN else 0]
        padding = (0, missing) if index == DOWN else (0, 0, 0, missing)
        return functional.pad(joined, padding).to(getattr(torch, self._checkpoint.dtype))

    def _stored(self, layer_id: int, index: int) -> str | None:
        """Return the name of a matrix of a layer's dense part, if it has one."""
        prefix = f"model.layers.{layer_id}.mlp"
        shared = f".{_SHARED}" if layer_id in self._checkpoint.shape.layers else ""
        name = f"{prefix}{shared}.{EXPERT_PARTS[index]}.weight"
        return name if name in self._old else None

    def _num_neurons(self, layer_id: int) -> int:
        shape, stored = self._checkpoint.shape, self._stored(layer_id, 0)
        of_expert = shape.intermediate_size if layer_id in shape.layers else 0
        return of_expert + (0 if stored is None else self._old[stored][0])


@torch.inference_mode()
def score_dense(folder: Path, rows: Rows, work: Path, on_progress: OnProgress) -> float:
    """Return the nats of rows by transformers' model, which is in memory as a whole, in float32.

    Raises :class:`CheckpointError` unless transformers finds every tensor, and no other.
    """
    from router.model.lean_transformers import transformers

    transformers.utils.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"transformers has {kind}: {sorted(info[kind])[:3]}", str(folder))
    model.eval()
    total = 0.0
    for index, (inputs, targets) in enumerate(zip(rows.inputs, rows.targets, strict=True)):
        on_progress("scoring the new model", index, len(rows.inputs))
        logits: Any = model(input_ids=inputs.unsqueeze(0), use_cache=False).logits
        total += functional.cross_entropy(logits[0], targets, reduction="sum").item()
    return total
