"""``expertmesh prune``, ``merge`` and ``upcycle``: they make a served folder of another model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from router.cli.common import INTERRUPTED, AsJson, fail, write, write_json
from router.observability.progress import phases
from router.ops.plan.sizes import format_size
from workshop.folders.options import MakeOptions, MergeOptions, PruneOptions, UpcycleOptions

if TYPE_CHECKING:
    from workshop.convert.plan import Plan
    from workshop.folders.card import Record
    from workshop.folders.making import Command

Source = Annotated[
    str,
    typer.Argument(
        help="A served folder, a folder of the deploy package, or a hub id (owner/name, "
        "owner/name@revision)."
    ),
]
Dense = Annotated[
    str,
    typer.Argument(
        help="A dense Llama-like model: a folder with config.json and safetensors, a hub id, "
        "or a .gguf file."
    ),
]
Dest = Annotated[Path, typer.Argument(help="Folder for the new model; new or empty.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="A UTF-8 text for calibration; a fifth of it is held out for the perplexities. "
        "Repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, and write nothing.")]
_HELP = """{}

Example: expertmesh {}

DEST appears at the end, complete, with a card. The same command resumes an interrupted run.
"""


def _folder_command(
    options: type[MakeOptions],
    opened: Callable[[str, Any], AbstractContextManager[Command]],
    source_kind: Any,
    *texts: str,
) -> Callable[..., None]:
    """Return the function of a command; its parameters are the fields of the options too."""

    def run(
        source: str, dest: Path, text: list[Path] | None, dry_run: bool, as_json: bool, **given: Any
    ) -> None:
        with opened(source, options(**given)) as command:
            _make_or_plan(command, dest, text or [], dry_run=dry_run, as_json=as_json)

    kinds = get_type_hints(options, include_extras=True)
    of_all = [field.name for field in fields(MakeOptions)]
    own_first = sorted(fields(options), key=lambda field: field.name in of_all)
    of_options = {field.name: (kinds[field.name], field.default) for field in own_first}
    common = {"text": (Texts, None), "dry_run": (DryRun, False), "as_json": (AsJson, False)}
    arguments = {"source": (source_kind, MISSING), "dest": (Dest, MISSING)}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=kind,
            )
            for name, (kind, default) in {**arguments, **of_options, **common}.items()
        ]
    )
    run.__doc__ = _HELP.format(*texts)
    return run


@contextmanager
def _pruning(source: str, options: PruneOptions) -> Iterator[Command]:
    from workshop.folders.making import source_checkpoint
    from workshop.folders.prune.command import Prune

    yield Prune(source_checkpoint(source), options)


@contextmanager
def _merging(source: str, options: MergeOptions) -> Iterator[Command]:
    from workshop.folders.making import source_checkpoint
    from workshop.folders.merge.command import Merge

    yield Merge(source_checkpoint(source), options)


@contextmanager
def _upcycling(source: str, options: UpcycleOptions) -> Iterator[Command]:
    from workshop.folders.dense_model import opened_dense
    from workshop.folders.upcycle.command import Upcycle

    with opened_dense(source) as model:
        yield Upcycle(model, options)


prune = _folder_command(
    PruneOptions,
    _pruning,
    Source,
    "Write a model with the most important experts of each layer.",
    "prune my-model my-model-4 --experts 4 --text novel.txt",
)
merge = _folder_command(
    MergeOptions,
    _merging,
    Source,
    "Write a model whose alike experts are merged: neurons aligned, weighted by use.",
    "merge my-model my-model-4 --experts 4 --text novel.txt",
)
upcycle = _folder_command(
    UpcycleOptions,
    _upcycling,
    Dense,
    "Write a dense model as a mixture of experts.",
    "upcycle model.gguf my-model --experts 16 --shared 8 --text novel.txt",
)


def _make_or_plan(
    command: Command, dest: Path, texts: list[Path], *, dry_run: bool, as_json: bool
) -> None:
    """Make a folder, or check that it can be made; prints what came of it."""
    from workshop.folders.making import make_folder, prepare

    if dry_run:
        _print_plan(prepare(command, dest, texts)[0], dest, as_json)
        return
    with again_after_ctrl_c(dest), phases("reading") as on_progress:
        record = make_folder(command, dest, texts, on_progress)
    _print_record(record, dest, as_json)


@contextmanager
def again_after_ctrl_c(dest: Path) -> Iterator[None]:
    """End a command that can be resumed with a line that says so."""
    from workshop.convert.staging import staging_folder

    try:
        yield
    except KeyboardInterrupt:
        fail(
            f"interrupted; what is whole is kept in {staging_folder(dest)}: run the same command "
            "again to resume",
            INTERRUPTED,
        )


def _print_plan(plan: Plan, dest: Path, as_json: bool) -> None:
    """Print what a dry run found."""
    if as_json:
        write_json({"dest": str(dest), "size_bytes": plan.size_bytes, "files": len(plan.shards)})
        return
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    write(f"{dest} would have {format_size(plan.size_bytes)} in {files}\n")


def _print_record(record: Record, dest: Path, as_json: bool) -> None:
    """Print what was made."""
    if as_json:
        write_json(record.model_dump())
        return
    write(
        f"{dest}: {format_size(record.size_bytes)} of {format_size(record.source_bytes)}; the card "
        "is its README.md\n"
    )
    if record.figures is not None:
        figures = record.figures
        write(
            f"perplexity of {figures.heldout_tokens:,} held-out tokens: "
            f"{figures.perplexity_before:.3f} before, {figures.perplexity_after:.3f} after\n"
        )
