"""Reading a Hugging Face safetensors folder: configuration, headers, and single tensors.

Opening a checkpoint reads ``config.json``, the index and the shards' headers, and no weight. It
checks every tensor's name, shape and dtype against the model family, so that a damaged or unknown
checkpoint is refused before any process starts. Pickle files are refused unread. Bytes of tensors
are verified as they are read, where the checkpoint has a table of hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.errors import CheckpointError, shown_name
from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.config import (
    checked_shape,
    family_of,
    read_json,
    usual_config,
    wrong_kinds,
)
from experts.checkpoint.quantization import Packed, check_dtypes, packed_tensors, quantization_of
from experts.checkpoint.shard_file import stamp_of_file
from experts.checkpoint.shards import DTYPES, TensorInfo, listed_names, read_headers
from experts.checkpoint.stored import RemoteFiles, Stored
from experts.families.base import Config, ExpertShape, Family, Shapes


@dataclass(frozen=True, slots=True)
class Checkpoint(Stored):
    """An opened and checked checkpoint, with headers only; see :class:`Stored`.

    ``config`` has the usual key names of all families. ``tensors`` are the stored tensors;
    ``packed`` has the model's quantised tensors, and ``dtype`` is that of all others.
    """

    family: Family
    shape: ExpertShape
    dtype: str
    packed: Mapping[str, Packed] = field(default_factory=dict, kw_only=True)

    @property
    def max_position_embeddings(self) -> int:
        """The model's longest context in tokens."""
        return int(self.config["max_position_embeddings"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.config["vocab_size"])

    @property
    def stored(self) -> str | None:
        """The method of the quantised weights in the files, if there are any."""
        return next((packed.method for packed in self.packed.values()), None)

    def expert_bytes(self, dtype: str) -> int:
        """Return the bytes of one expert's weights in ``dtype``, also of quantised weights."""
        return self.shape.expert_parameters * DTYPE_BYTES[dtype]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's configuration and headers.

    Raises :class:`CheckpointError`, whose field is the file, for a missing or broken
    ``config.json``, an unknown architecture, a missing or truncated shard, pickle weights, an
    unknown quantisation, and tensors that are missing, unexpected, or of another shape or dtype
    than the configuration says.
    """
    config = read_json(folder / "config.json")
    shards = [file for file in folder.glob("*.safetensors") if file.is_file()]
    before = {file.name: stamp_of_file(file) for file in shards}
    opened = checkpoint_of(folder, config, lambda: read_headers(folder, read_json))
    files = sorted({info.file for info in opened.tensors.values()})
    stamps = {file: stamp_of_file(folder / file) for file in files}
    for file, stamp in stamps.items():
        if stamp != before.get(file):
            raise CheckpointError("has changed while it was opened", str(folder / file))
    return replace(opened, stamps=stamps)


def checkpoint_of(
    folder: Path,
    config: Config,
    read_tensors: Callable[[], dict[str, TensorInfo]],
    remote: RemoteFiles | None = None,
) -> Checkpoint:
    """Check a configuration, then the headers beside it; see :func:`open_checkpoint`."""
    config_file = folder / "config.json"
    family = family_of(config, config_file)
    config = usual_config(family, config, config_file)
    shape = checked_shape(family, config, config_file)
    with wrong_kinds(config_file):
        ignored = family.ignored(config)
    tensors = {name: info for name, info in read_tensors().items() if not name.startswith(ignored)}
    expected = _expected(folder, family, config, shape, len(tensors))
    packed = packed_tensors(quantization_of(config, config_file), expected, tensors, folder)
    _check_tensors(folder, config, _stored(expected, packed), tensors)
    dtype = _plain_dtype(folder, family, tensors, packed)
    return Checkpoint(folder, config, tensors, family, shape, dtype, remote=remote, packed=packed)


def _expected(
    folder: Path, family: Family, config: Config, shape: ExpertShape, num_tensors: int
) -> Shapes:
    """Return the model's tensors; raises :class:`CheckpointError` if the files have far too few."""
    with wrong_kinds(folder / "config.json"):
        expected = family.dense_tensors(config)
    names = len(shape.layers) * (1 if family.stacks_experts else shape.num_experts)
    if names > num_tensors:  # checked first: making the names takes memory
        raise CheckpointError(
            f"lacks tensors: config.json says {shape.num_experts} experts in each of "
            f"{len(shape.layers)} layers, the files hold {num_tensors} tensors",
            str(folder),
        )
    with wrong_kinds(folder / "config.json"):
        return expected | {part.name: part.shape for part in family.expert_parts(config, shape)}


def _stored(expected: Shapes, packed: Mapping[str, Packed]) -> Shapes:
    """Return the expected stored tensors: codes and scales in place of quantised tensors."""
    stored = {name: shape for name, shape in expected.items() if name not in packed}
    for tensor in packed.values():
        stored |= tensor.stored()
    return stored


def _check_tensors(
    folder: Path, config: Config, expected: Shapes, tensors: dict[str, TensorInfo]
) -> None:
    ignored = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys() - ignored)
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise CheckpointError(
                f"{problem} {len(names)} tensors: {listed_names(names)}", str(folder)
            )
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(info.shape)}; config.json says {list(shape)}",
                str(folder / info.file),
            )


def _plain_dtype(
    folder: Path,
    family: Family,
    tensors: dict[str, TensorInfo],
    packed: Mapping[str, Packed],
) -> str:
    """Return the one dtype of all tensors that are not quantised."""
    for tensor in packed.values():
        check_dtypes(tensor, tensors, folder)
    stored = {name for tensor in packed.values() for name in (tensor.codes, tensor.scales)}
    dtypes = set()
    for name, info in tensors.items():
        if name in stored:
            continue
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {shown_name(name)} has dtype {info.dtype}, and the quantization_config of "
                f"config.json names no method with this dtype; supported: {', '.join(DTYPES)}",
                str(folder / info.file),
            )
        if info.dtype != "F32" or not name.endswith(family.in_float32):
            dtypes.add(info.dtype)
    if len(dtypes) > 1:
        raise CheckpointError(f"mixes the dtypes {', '.join(sorted(dtypes))}", str(folder))
    return DTYPES[dtypes.pop()]
