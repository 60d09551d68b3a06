"""The served models, as the builder finds them before anything is deployed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import CheckpointError, ConfigError, shown
from cluster.placement.placement import assign_experts
from cluster.spec import (
    ActorSpec,
    ModelExperts,
    ModelSource,
    PoolSpec,
    budgets_of,
    model_id_of,
    model_key,
)
from experts.checkpoint.checkpoint import Checkpoint
from experts.checkpoint.config import parse_json
from experts.checkpoint.hub import parse_hub_id
from experts.checkpoint.identity import identity_of, text_identity
from experts.checkpoint.mixture import Mixture
from experts.checkpoint.remote.remote_files import Neighbours, open_model
from experts.checkpoint.stored import Stored, pinned_path
from experts.mixture.spec import MixtureSpec, interface_of, most_experts
from router.config.deployment import AppConfig, ExpertsConfig, load_deployment
from router.config.models import ModelConfig

Identify = Callable[[Stored], str]
"""Returns the identity of an opened folder."""
MIXTURE_LAYERS = (0,)
"""The layers of a mixture, as placement, frames and actors count them: one."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A language model or a mixture, by its source."""

    source: ModelSource

    @property
    def id(self) -> str:
        """The id that requests name."""
        return model_id_of(self.key)

    @property
    def key(self) -> str:
        """The name in the placement, which says the content too."""
        return self.source.experts.model

    @property
    def path(self) -> str:
        """The configured path of the checkpoint's folder; of a hub id with the resolved commit."""
        return self.source.path


@dataclass(frozen=True, slots=True)
class ServedModel(_Served):
    """The description of a model that routers and gateways get: plain data, without weights.

    ``max_model_len`` bounds prompt plus output, in tokens. ``eos_token_ids`` end a choice and never
    show in its text. ``stored`` is the quantisation of the files, ``None`` where they have none.
    """

    family: str
    vocab_size: int
    max_model_len: int
    num_experts_per_tok: int
    eos_token_ids: tuple[int, ...]
    stored: str | None = None
    identity: str = ""
    """A hash of the content and of all settings that can change a token."""
    text_identity: str = ""
    """A hash of the files by which text becomes ids (:mod:`experts.checkpoint.identity`)."""

    @property
    def dtype(self) -> str:
        """The dtype of the weights in memory."""
        return self.source.dtype

    @property
    def num_layers(self) -> int:
        """The number of MoE layers."""
        return len(self.source.experts.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers of the model that have experts, ascending."""
        return self.source.experts.layers

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer."""
        return self.source.experts.num_experts


@dataclass(frozen=True, slots=True)
class ServedMixture(_Served):
    """The description of a mixture that routers and gateways get: plain data, without weights.

    The mixture has one layer, 0, and its experts are numbered as in ``spec.expert_names``.
    """

    spec: MixtureSpec
    interface: str = ""
    """The hash of inputs and outputs (:func:`experts.mixture.spec.interface_of`)."""
    identity: str = ""
    """A hash of the content and of all settings that can change a prediction."""


Served = ServedModel | ServedMixture


def inspect_models(
    config: AppConfig,
    root: str = "args",
    neighbours: Neighbours | None = None,
    identify: Identify = identity_of,
) -> list[Served]:
    """Open every configured model, and check that the pools can hold all experts.

    Reads headers of checkpoints and all experts of mixtures, and what ``identify`` reads: by
    default every byte where no current hashes are kept. ``neighbours``, if given, read a model that
    is not on this node. Raises :class:`ConfigError` or :class:`CheckpointError` with the YAML path
    or the file.
    """
    if config.experts.tls is not None:
        config.experts.tls.files().server_context(f"{root}.experts.tls")
    served = [
        _inspect(model, f"{root}.models[{i}]", neighbours, identify)
        for i, model in enumerate(config.models)
    ]
    emulated = config.experts.emulated_pools
    served = [with_identity(_of_pools(model, emulated), config) for model in served]
    pools = pool_specs(config.experts, served)
    assign_experts(
        [model.source.experts for model in served],
        [actor_id for pool in pools for actor_id in pool.actor_ids()],
        budgets_of(pools),
        config.experts.min_copies,
    )
    return served


def language_models(served: Sequence[Served]) -> list[ServedModel]:
    """Return the served language models."""
    return [model for model in served if isinstance(model, ServedModel)]


def pool_specs(experts: ExpertsConfig, models: Sequence[Served]) -> tuple[PoolSpec, ...]:
    """Return the pools for the controller, without Serve's name of the application."""
    return tuple(
        PoolSpec(
            pool.name,
            pool.actors,
            pool.memory_budget_bytes,
            ActorSpec(
                app="",
                models=tuple(model.source for model in models),
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                threads=pool.threads,
                max_queue_rows=experts.max_queue_rows,
                tls=None if experts.tls is None else experts.tls.files(),
                resources=pool.resources,
                emulation=None if pool.emulate is None else pool.emulate.emulation(),
            ),
            None if pool.autoscaling is None else pool.autoscaling.targets(),
        )
        for pool in experts.all_pools()
    )


def _inspect(
    model: ModelConfig, where: str, neighbours: Neighbours | None, identify: Identify
) -> Served:
    try:
        opened = open_model(model.path, None, neighbours)
        identity = identify(opened)
        if isinstance(opened, Mixture):
            return _inspect_mixture(opened, model, where, identity)
    except CheckpointError as error:
        raise type(error)(error.message, f"{where}.path: {error.field}") from None
    if opened.remote is not None:
        opened.remote.release()
    return _inspect_checkpoint(opened, model, where, identity)


def _inspect_mixture(
    mixture: Mixture, model: ModelConfig, where: str, identity: str
) -> ServedMixture:
    from experts.backends.check import check_mixture  # imports torch

    spec = mixture.spec
    if model.dtype not in ("auto", spec.dtype):
        raise ConfigError(
            f"must be auto: mixture.yaml has the dtype, {spec.dtype} (given: {model.dtype})",
            f"{where}.dtype",
        )
    if model.max_model_len is not None:
        raise ConfigError("is for language models, not for a mixture", f"{where}.max_model_len")
    experts = ModelExperts(
        model_key(model.id, identity, spec.dtype),
        MIXTURE_LAYERS,
        len(spec.experts),
        max(check_mixture(mixture)),
    )
    source = ModelSource(pinned_path(model.path, mixture), spec.dtype, experts, identity)
    return ServedMixture(source, spec, interface_of(spec))


def _inspect_checkpoint(
    checkpoint: Checkpoint, model: ModelConfig, where: str, identity: str
) -> ServedModel:
    _check_tokenizer(checkpoint, where)
    longest = checkpoint.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > longest:
        raise ConfigError(
            f"must be at most the model's own {longest} (given: {model.max_model_len})",
            f"{where}.max_model_len",
        )
    dtype = checkpoint.dtype if model.dtype == "auto" else model.dtype
    shape = checkpoint.shape
    experts = ModelExperts(
        model_key(model.id, identity, dtype),
        shape.layers,
        shape.num_experts,
        checkpoint.expert_bytes(dtype),
    )
    return ServedModel(
        source=ModelSource(pinned_path(model.path, checkpoint), dtype, experts, identity),
        family=checkpoint.family.model_type,
        vocab_size=checkpoint.vocab_size,
        max_model_len=model.max_model_len or longest,
        num_experts_per_tok=shape.num_experts_per_tok,
        eos_token_ids=_eos_token_ids(checkpoint),
        stored=checkpoint.stored,
        text_identity=text_identity(checkpoint),
    )


def _of_pools(model: Served, emulated: Sequence[str]) -> Served:
    """Return a model with another key where pools emulate it.

    A router of the real model, whose answers are exact, must never ask emulating actors, whose rows
    are zeros.
    """
    if not emulated:
        return model
    source = model.source
    content = f"{source.dtype}, emulated by {', '.join(sorted(emulated))}"
    experts = replace(source.experts, model=model_key(model.id, source.identity, content))
    return replace(model, source=replace(source, experts=experts))


def with_identity(model: Served, config: AppConfig) -> Served:
    """Return a model with a hash of its content and of the settings that can change an answer.

    With the files of a language model's text: a request whose prompt is tokenised anew does not go
    on from tokens that followed another prompt.
    """
    capacity = config.router.expert_capacity
    text = (model.text_identity, model.eos_token_ids) if isinstance(model, ServedModel) else ()
    settings = [
        model.key,
        *text,
        None if capacity is None else capacity.model_dump(),
        sorted(config.experts.emulated_pools),
    ]
    identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    return replace(model, identity=identity)


def _check_tokenizer(checkpoint: Checkpoint, where: str) -> None:
    names = ("tokenizer.json", "tokenizer.model")
    if all(checkpoint.small_file(name) is None for name in names):
        raise CheckpointError(
            f"has no tokenizer ({' or '.join(names)})", f"{where}.path: {checkpoint.folder}"
        )


def _eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that end a text; those of ``generation_config.json`` take precedence."""
    eos = checkpoint.config.get("eos_token_id")
    file: Path = checkpoint.folder / "generation_config.json"
    generation = checkpoint.small_file(file.name)
    if generation is not None:
        eos = parse_json(generation, file).get("eos_token_id", eos)
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if any(type(i) is not int or not 0 <= i < checkpoint.vocab_size for i in ids):
        raise CheckpointError(f"eos_token_id {shown(eos)} is not in the vocabulary", str(file))
    return ids


def headers_alone(stored: Stored) -> str:
    """Return no identity, and read nothing, where only headers are checked."""
    return ""


def check_file(path: Path, identify: Identify = headers_alone) -> list[str]:
    """Check a deployment file and its models' headers; returns a line for each application and
    model.

    ``identify`` is called for the checkpoint of each model. Raises :class:`ConfigError` or
    :class:`CheckpointError` for the first error.
    """
    lines = []
    for name, config in load_deployment(path):
        served = inspect_models(config, f"{path}: applications.{name}.args", identify=identify)
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


def _describe(model: Served) -> str:
    hub_id = parse_hub_id(model.path)
    origin = f", from {hub_id}" if hub_id is not None and hub_id.revision is not None else ""
    experts = model.source.experts
    total_mb = len(experts.expert_keys()) * experts.expert_bytes / 1e6
    if isinstance(model, ServedMixture):
        kinds = Counter(expert.kind for expert in model.spec.experts.values())
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return (
            f"mixture {model.id}: {listed} experts (at most {most_experts(model.spec)} a row), "
            f"{model.spec.combine.kind}, {model.source.dtype}, experts {total_mb:.1f} MB{origin}"
        )
    dtype = model.dtype if model.stored is None else f"{model.dtype} (stored as {model.stored})"
    return (
        f"model {model.id}: {model.family}, {model.num_layers} layers of {model.num_experts} "
        f"experts (top {model.num_experts_per_tok}), {dtype}, experts {total_mb:.1f} MB, "
        f"context {model.max_model_len} tokens{origin}"
    )
