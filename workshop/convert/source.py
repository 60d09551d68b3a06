"""A model in another layout: its configuration, its tensors' names, and how to read each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, shown_name
from experts.checkpoint.shards import DTYPES, TensorInfo, read_all
from experts.families.base import Config

if TYPE_CHECKING:
    import torch


QUANTISED = "quantised"
"""The dtype of an entry with codes, which reading dequantises to float32."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the source: ``dtype`` is float32, bfloat16, float16 or :data:`QUANTISED`."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Protocol):
    """The source's tensors by name."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All tensors by name; known from the headers."""
        ...

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows ``begin`` to ``end`` of the first axis; raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class MadeTensors:
    """Tensors that are made as they are read: ``make`` returns a whole one of the ``entries``."""

    entries: Mapping[str, Entry]
    make: Callable[[str], torch.Tensor]

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor."""
        return self.make(name)[begin:end]


@dataclass(frozen=True, slots=True)
class Take:
    """The steps from a tensor of the source to a tensor of the model.

    ``part`` (index, count) takes one of ``count`` equal shares of the first axis. ``transpose``
    swaps the axes. ``rotary_heads`` is the number of heads whose rows the source stores as pairs of
    the rotary embedding; the model has all first members of the pairs, then all second members.
    """

    name: str
    part: tuple[int, int] | None = None
    transpose: bool = False
    rotary_heads: int | None = None


def as_named(name: str) -> list[Take]:
    """Return the take of a tensor that has the model's name in the source."""
    return [Take(name)]


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source; ``takes`` returns the possible takes of a tensor, of which one exists.

    ``text_folder`` has the tokenizer's files where these are not beside the weights.
    """

    layout: str
    path: Path
    config_file: Path
    config: Config
    tensors: Tensors
    files: tuple[Path, ...]
    takes: Callable[[str], list[Take]] = as_named
    text_folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the tokenizer's files."""
        if self.text_folder is not None:
            return self.text_folder
        return self.path if self.path.is_dir() else self.path.parent


def shape_after(take: Take, entry: Entry) -> tuple[int, ...] | None:
    """Return the shape of :func:`read`'s result, or ``None`` if the parts are not equal."""
    shape = entry.shape
    if take.part is not None:
        _, count = take.part
        if not shape or shape[0] % count:
            return None
        shape = (shape[0] // count, *shape[1:])
        if len(shape) == 3:
            shape = shape[1:] if shape[0] == 1 else shape
    return shape[::-1] if take.transpose else shape


def read(tensors: Tensors, take: Take) -> torch.Tensor:
    """Return a tensor of the model in the source's dtype; raises CheckpointError."""
    num_rows = tensors.entries[take.name].shape[0]
    begin, end = 0, num_rows
    if take.part is not None:
        index, count = take.part
        begin, end = index * num_rows // count, (index + 1) * num_rows // count
    tensor = tensors.read(take.name, begin, end)
    if take.part is not None and tensor.dim() == 3:
        tensor = tensor[0]
    if take.transpose:
        tensor = tensor.T
    if take.rotary_heads is not None:
        pairs = tensor.reshape(take.rotary_heads, -1, 2, tensor.shape[-1])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")


def takes_by_part(
    config: Config,
    layers: str,
    outer: Mapping[str, str],
    in_layer: Mapping[str, str],
    rest: Callable[[str, str], list[Take]] = lambda prefix, part: [],
) -> Callable[[str], list[Take]]:
    """Return the function from a tensor's name to its takes, for a layout of llama.cpp or Mistral.

    ``layers`` is the prefix of all layers' names. ``outer`` and ``in_layer`` have the layout's name
    of a tensor outside and inside of a layer. ``rest(prefix of the layer, part)`` returns the takes
    of all other tensors of a layer. Queries and keys are rotary pairs, but not those of Qwen2.
    """
    rotary = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    rotary = {} if config["model_type"] == "qwen2" else rotary

    def takes(name: str) -> list[Take]:
        match = _LAYER.fullmatch(name)
        if match is None:
            return [Take(outer[name])] if name in outer else []
        prefix, part, kind = f"{layers}.{int(match[1])}", match[2], match[3]
        if part in in_layer:
            return [Take(f"{prefix}.{in_layer[part]}.{kind}", rotary_heads=rotary.get(part))]
        return rest(prefix, part)

    return takes


def expert_part(part: str) -> tuple[int, str] | None:
    """Return the expert and the matrix (``w1``) of a part, or ``None`` for any other part."""
    match = _EXPERT.fullmatch(part)
    return None if match is None else (int(match[1]), match[2])


class SafetensorsFiles:
    """The tensors of files with checked headers."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Read the headers of one or more files in one folder.

        Raises :class:`CheckpointError` for a missing or broken file, a dtype that cannot be
        converted, and a tensor in two files.
        """
        tensors = read_all(files)
        self.entries = {name: _entry(name, info, files[0]) for name, info in tensors.items()}
        self._files = {name: files[0].parent / info.file for name, info in tensors.items()}

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows of a tensor; only these rows are read."""
        file = self._files[name]
        try:
            with safe_open(str(file), framework="pt") as opened:
                return opened.get_slice(name)[begin:end]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} cannot be read: {error}", str(file)) from None


def _entry(name: str, info: TensorInfo, file: Path) -> Entry:
    if not info.shape or 0 in info.shape:
        raise CheckpointError(
            f"tensor {shown_name(name)} has shape {list(info.shape)}",
            str(file.with_name(info.file)),
        )
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {shown_name(name)} has dtype {info.dtype}, and nothing says how it is "
            f"quantised; supported: {', '.join(DTYPES)}",
            str(file.with_name(info.file)),
        )
    return Entry(info.shape, DTYPES[info.dtype])
