"""The plan of a conversion: the source and the shard of every tensor of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from cluster.errors import CheckpointError, shown_name
from cluster.wire.frames import DTYPE_BYTES
from experts.checkpoint.config import checked_shape, family_of, usual_config, wrong_kinds
from experts.checkpoint.shards import MAX_LISTED, WEIGHTS_FILE, listed_names
from experts.families.base import Config, Family
from workshop.convert.source import QUANTISED, Entry, Source, Take, shape_after

Found = tuple[str, tuple[int, ...], Take]
"""A tensor to write: its name, its shape and its place in the source."""


STORED = "stored"
"""The dtype of a plan that keeps each tensor's own; quantised tensors become bfloat16."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to write, in ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    take: Take

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write, with ``size_bytes`` of tensors."""

    file: str
    pieces: tuple[Piece, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All shards to write; ``config`` is the new ``config.json``.

    ``dtype`` is that of most bytes.
    """

    source: Source
    config: Config
    dtype: str
    source_dtypes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def num_tensors(self) -> int:
        """Number of tensors."""
        return sum(len(shard.pieces) for shard in self.shards)


def make_plan(source: Source, dtype: str, max_shard_bytes: int) -> Plan:
    """Find every tensor of the model in the source.

    ``auto`` is the dtype of most bytes, or bfloat16 where these are quantised; :data:`STORED` keeps
    each tensor's own. Raises :class:`CheckpointError` with the names of tensors that are missing,
    unexpected, found twice, or of another shape than the configuration says.
    """
    found = _found(source)
    _refuse_unexpected(source, {take.name for _, _, take in found})
    return plan_of(source, found, dtype, max_shard_bytes)


def plan_of(source: Source, found: list[Found], dtype: str, max_shard_bytes: int) -> Plan:
    """Return the plan of known tensors; see :func:`make_plan` for ``dtype``."""
    entries = source.tensors.entries
    sizes: Counter[str] = Counter()
    for name in {take.name for _, _, take in found}:
        entry = entries[name]
        sizes[entry.dtype] += prod(entry.shape) * DTYPE_BYTES.get(entry.dtype, 2)
    most = _plain(sizes.most_common(1)[0][0])
    pieces = [
        Piece(name, shape, _dtype_of(entries[take.name], dtype, most), take)
        for name, shape, take in found
    ]
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    dtype = most if dtype in ("auto", STORED) else dtype
    shards = _shards(pieces, max_shard_bytes)
    return Plan(source, config | {"dtype": dtype}, dtype, tuple(sorted(sizes)), shards)


def _dtype_of(entry: Entry, wanted: str, most: str) -> str:
    return {"auto": most, STORED: _plain(entry.dtype)}.get(wanted, wanted)


def _plain(dtype: str) -> str:
    return "bfloat16" if dtype == QUANTISED else dtype


def _found(source: Source) -> list[Found]:
    pieces: list[Found] = []
    missing = []
    for name, shape in _expected(source):
        takes = source.takes(name)
        found = [take for take in takes if take.name in source.tensors.entries]
        if len(found) > 1:
            names = " and ".join(take.name for take in found)
            raise CheckpointError(f"has {names}, which are the same tensor", str(source.path))
        if found:
            _check_shape(source, found[0], shape)
            pieces.append((name, shape, found[0]))
        else:
            missing.append(" or ".join(take.name for take in takes[:2]))
        if len(missing) > MAX_LISTED:  # a wrong configuration can have any number of names
            break
    if missing:
        raise CheckpointError(f"lacks tensors: {listed_names(missing)}", str(source.path))
    return pieces


def _expected(source: Source) -> Iterator[tuple[str, tuple[int, ...]]]:
    family, config = _family(source)
    shape = checked_shape(family, config, source.config_file)
    with wrong_kinds(source.config_file):
        yield from family.dense_tensors(config).items()
        last = ""
        for part in family.expert_parts(config, shape):
            if part.name != last:  # GPT-OSS has gate and up in one tensor
                yield part.name, part.shape
            last = part.name


def _family(source: Source) -> tuple[Family, Config]:
    """Return a source's family, and its configuration with the usual key names."""
    family = family_of(source.config, source.config_file)
    return family, usual_config(family, source.config, source.config_file)


def _check_shape(source: Source, take: Take, expected: tuple[int, ...]) -> None:
    entry = source.tensors.entries[take.name]
    if shape_after(take, entry) != expected:
        parts = "" if take.part is None else f" in {take.part[1]} parts"
        raise CheckpointError(
            f"tensor {shown_name(take.name)} has shape {list(entry.shape)}; "
            f"{source.config_file.name} says {list(expected)}"
            f"{' transposed' if take.transpose else ''}{parts}",
            str(source.path),
        )


def _refuse_unexpected(source: Source, taken: set[str]) -> None:
    family, config = _family(source)
    with wrong_kinds(source.config_file):
        ignored = family.ignored(config)
    unexpected = {n for n in source.tensors.entries.keys() - taken if not n.startswith(ignored)}
    if source.config.get("tie_word_embeddings"):
        unexpected -= {take.name for take in source.takes("lm_head.weight")}
    if unexpected:
        raise CheckpointError(
            f"has unexpected tensors: {listed_names(sorted(unexpected))}", str(source.path)
        )


def _shards(pieces: list[Piece], max_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Piece]] = [[]]
    sizes = [0]
    for piece in pieces:
        size_bytes = piece.num_bytes
        if groups[-1] and sizes[-1] + size_bytes > max_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(piece)
        sizes[-1] += size_bytes
    if len(groups) == 1:
        return (Shard(WEIGHTS_FILE, tuple(groups[0]), sizes[0]),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group), size_bytes)
        for number, (group, size_bytes) in enumerate(zip(groups, sizes, strict=True), 1)
    )
