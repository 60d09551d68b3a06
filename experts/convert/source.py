"""What a layout tells of a model in it: configuration, tensors, and where each is to be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experts.families.base import Config

if TYPE_CHECKING:
    import torch

QUANTISED = "quantised"
"""The dtype of an entry whose values are codes, which reading turns into float32."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the source: ``dtype`` is float32, bfloat16, float16 or :data:`QUANTISED`."""

    shape: tuple[int, ...]
    dtype: str


class Tensors(Protocol):
    """The source's tensors by name."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is; known without reading a weight."""
        ...

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Return rows ``begin`` to ``end`` of the first axis; raises CheckpointError."""
        ...


@dataclass(frozen=True, slots=True)
class Take:
    """How one tensor of the model comes out of one of the source.

    ``part`` (which, of how many) takes an equal share of the first axis; ``transpose`` swaps the
    axes; ``rotary_heads`` says that the rows of so many heads lie as the pairs that the rotary
    embedding turns, where the model has first all first, then all second members of the pairs.
    """

    name: str
    part: tuple[int, int] | None = None
    transpose: bool = False
    rotary_heads: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source; ``takes`` gives the places where a tensor may be, one of which must be."""

    layout: str
    path: Path
    config_file: Path
    config: Config
    tensors: Tensors
    takes: Callable[[str], list[Take]]
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where the tokenizer's files are looked for."""
        return self.path if self.path.is_dir() else self.path.parent


def shape_after(take: Take, entry: Entry) -> tuple[int, ...] | None:
    """Return the shape that :func:`read` gives, or ``None`` where the parts are not equal."""
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
    """Return a tensor of the model as the source has it, in its dtype; raises CheckpointError."""
    num_rows = tensors.entries[take.name].shape[0]
    begin, end = 0, num_rows
    if take.part is not None:
        which, count = take.part
        begin, end = which * num_rows // count, (which + 1) * num_rows // count
    tensor = tensors.read(take.name, begin, end)
    if take.part is not None and tensor.dim() == 3:
        tensor = tensor[0]
    if take.transpose:
        tensor = tensor.T
    if take.rotary_heads is not None:
        pairs = tensor.reshape(take.rotary_heads, -1, 2, tensor.shape[-1])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()
