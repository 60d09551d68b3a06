"""The folder beside the destination in which a conversion is made, and by which it is resumed.

It is ``.NAME.converting``: ``job.json`` tells of what and how, ``model/`` becomes the destination
by one rename. A shard in ``model/`` is whole, as it is written under another name first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from experts.checkpoint.shards import DTYPES
from experts.convert.plan import Plan, Shard

_JOB_FILE = "job.json"
_MODEL_FOLDER = "model"
UNFINISHED = ".unfinished"


class ConvertFailedError(ExpertMeshError):
    """The disk or another program came in the way; what is written is kept; ``field``: the path."""


def staging_folder(dest: Path) -> Path:
    """Return where a conversion to ``dest`` is made."""
    dest = dest.absolute()
    return dest.parent / f".{dest.name}.converting"


def finished_shards(dest: Path) -> int:
    """Return how many shards of a broken-off conversion lie there."""
    return len(list((staging_folder(dest) / _MODEL_FOLDER).glob("*.safetensors")))


def check_dest(dest: Path) -> None:
    """Raise :class:`ConfigError` unless ``dest`` is new or an empty folder."""
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise ConfigError("is no folder; DEST names a new or empty one", str(dest))
    try:
        found = sorted(file.name for file in dest.iterdir()) if dest.exists() else []
    except OSError as error:
        raise ConvertFailedError(f"cannot be read: {error.strerror}", str(dest)) from None
    if found:
        raise ConfigError(
            f"holds files ({', '.join(found[:3])}); DEST must be new or empty", str(dest)
        )


@contextmanager
def staged(plan: Plan, dest: Path, max_shard_bytes: int) -> Iterator[Path]:
    """Give the folder to write the model in, with the whole shards of the same job in it.

    What another job left there is deleted. Raises :class:`ConvertFailedError` when the folder
    cannot be made or another conversion is at work in it.
    """
    staging = staging_folder(dest)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise ConvertFailedError(f"cannot be made: {error.strerror}", str(staging)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _prepare(staging, job(plan, max_shard_bytes), {shard.file for shard in plan.shards})
        yield staging / _MODEL_FOLDER
    except BlockingIOError:
        raise ConvertFailedError("another conversion is at work there", str(staging)) from None
    except OSError as error:
        raise ConvertFailedError(
            f"cannot be written: {error.strerror or error}; what is whole is kept: mend it, then "
            "run the same command again",
            str(staging),
        ) from None
    finally:
        os.close(lock)


def job(plan: Plan, max_shard_bytes: int) -> dict[str, Any]:
    """Return what makes two conversions the same: the source's files as they are now, and how.

    Raises :class:`CheckpointError` when a file of the source has gone.
    """
    try:
        stats = [(str(file.resolve()), file.stat()) for file in plan.source.files]
    except OSError as error:
        raise CheckpointError(f"has changed: {error}", str(plan.source.path)) from None
    return {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "dtype": plan.dtype,
        "max_shard_bytes": max_shard_bytes,
    }


def publish(staging: Path, dest: Path) -> None:
    """Make the finished model appear as ``dest`` in one step, and remove the rest."""
    (staging / _MODEL_FOLDER).replace(dest)
    shutil.rmtree(staging)


def is_whole(file: Path, shard: Shard, dtype: str) -> bool:
    """Tell whether a shard lies there with the names, shapes and bytes that it must have."""
    wanted = {piece.name: piece.shape for piece in shard.pieces}
    try:
        with safe_open(str(file), framework="numpy") as opened:  # it checks the file's length
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return all(DTYPES.get(part.get_dtype()) == dtype for part in found.values()) and (
                wanted == {name: tuple(part.get_shape()) for name, part in found.items()}
            )
    except (SafetensorError, OSError):
        return False


def _prepare(staging: Path, wanted: dict[str, Any], shard_files: set[str]) -> None:
    job_file, model = staging / _JOB_FILE, staging / _MODEL_FOLDER
    try:
        is_same = json.loads(job_file.read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        is_same = False
    if not is_same and model.exists():
        shutil.rmtree(model)
    model.mkdir(exist_ok=True)
    for file in model.iterdir():  # a killed conversion leaves unfinished files
        if file.name not in shard_files:
            file.unlink()
    write_whole(job_file, json.dumps(wanted).encode())


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file so that it is there as a whole or not at all."""
    unfinished = file.with_name(file.name + UNFINISHED)
    unfinished.write_bytes(data)
    _finish(unfinished, file)


def finish_shard(unfinished: Path, folder: Path, file: str) -> None:
    """Give a written shard its name, readable by whom the user lets read files."""
    # safetensors makes files for their owner only; the job's was made by the user's umask.
    unfinished.chmod((folder.parent / _JOB_FILE).stat().st_mode)
    _finish(unfinished, folder / file)


def _finish(unfinished: Path, file: Path) -> None:
    """Give a written file its name when its bytes are on the disk."""
    with unfinished.open("rb") as opened:
        os.fsync(opened.fileno())
    unfinished.replace(file)
