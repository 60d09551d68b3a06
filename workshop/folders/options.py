"""The options of prune, merge and upcycle, as the command line and Python give them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import typer

from router.ops.plan.sizes import parse_size

Importance = Literal["weight", "output", "random"]
Alike = Literal["routing", "output"]
Division = Literal["split", "copies"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_COPIES_ACTIVE = 2


def size(given: str | int) -> int:
    """Return the bytes of a size like 5GB; a number is one already. Raises ``ConfigError``."""
    return given if isinstance(given, int) else parse_size(given, "--max-shard-size")


MaxShardSize = Annotated[
    int,
    typer.Option(
        parser=size, metavar="<size>", show_default="5GB", help="Most bytes of a file, like 5GB."
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="auto: the source's most common dtype; of quantised weights, bfloat16."),
]
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """The options of all three commands; a field's text is its line in the help."""

    sequences: Annotated[
        int, typer.Option(help="Most sequences for calibration, and held out.")
    ] = 64
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256
    max_shard_size: MaxShardSize = MAX_SHARD_BYTES

    def recipe(self) -> dict[str, Any]:
        """Return the options that decide the bytes of the model, those of all commands last."""
        given = asdict(self)
        common = {name: given.pop(name) for name in MakeOptions.__dataclass_fields__}
        return {name: value for name, value in given.items() if name != "speed"} | common


@dataclass(frozen=True)
class PruneOptions(MakeOptions):
    """The options of ``expertmesh prune``."""

    experts: Annotated[int, typer.Option(help="Experts that stay in each layer.")]
    by: Annotated[
        Importance,
        typer.Option(
            help="Importance: the gate's weight times the hit rate, the norm of the weighted "
            "output (REAP), or a random number, as a control."
        ),
    ] = "output"
    seed: Annotated[int, typer.Option(min=0, help="Seed of --by random.")] = 0


@dataclass(frozen=True)
class MergeOptions(MakeOptions):
    """The options of ``expertmesh merge``."""

    experts: Annotated[int, typer.Option(help="Experts of each layer afterwards.")]
    by: Annotated[
        Alike,
        typer.Option(help="Which experts are alike: by the gate's logits, or by their outputs."),
    ] = "output"
    dense: Annotated[
        bool,
        typer.Option(
            "--dense", help="With --experts 1: write a plain dense model for transformers."
        ),
    ] = False


@dataclass(frozen=True)
class UpcycleOptions(MakeOptions):
    """The options of ``expertmesh upcycle``."""

    experts: Annotated[int, typer.Option(help="Experts of each layer.")]
    by: Annotated[
        Division,
        typer.Option(
            help="Divide the neurons into experts and a shared expert, or copy the layer into "
            "every expert."
        ),
    ] = "split"
    shared: Annotated[
        int, typer.Option(help="With --by split: the shared expert's size, in experts.")
    ] = 1
    active: Annotated[
        int | None,
        typer.Option(help="Experts of a token.", show_default="all parts, or two copies"),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the gate of --by copies.")] = 0
    dtype: DtypeOption = "auto"
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Time the model too, for the card: on a quiet machine."),
    ] = False

    @property
    def num_active(self) -> int:
        """The experts of a token."""
        if self.active is not None:
            return self.active
        return self.experts if self.by == "split" else min(_COPIES_ACTIVE, self.experts)
