"""The folder beside the destination that holds an unfinished conversion, pruning or merging.

The folder is ``.NAME.converting``. ``job.json`` has the source and the options; ``model/`` becomes
the destination by one rename. Every shard in ``model/`` is complete, because it is written under
another name first. So an interrupted command can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError, ConfigError, ExpertMeshError
from experts.checkpoint.shards import DTYPES
from workshop.convert.plan import Shard
from workshop.convert.source import Source

_JOB_FILE = "job.json"
_MODEL_FOLDER = "model"
UNFINISHED = ".unfinished"


class ConvertFailedError(ExpertMeshError):
    """The disk or another program stopped the writing at the path ``field``; shards are kept."""


def staging_folder(dest: Path) -> Path:
    """Return the folder of an unfinished model for ``dest``."""
    dest = dest.absolute()
    return dest.parent / f".{dest.name}.converting"


def check_dest(dest: Path) -> None:
    """Raise :class:`ConfigError` unless ``dest`` is new or an empty folder."""
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise ConfigError("is not a folder; DEST must be a new or empty folder", str(dest))
    try:
        found = sorted(file.name for file in dest.iterdir()) if dest.exists() else []
    except OSError as error:
        raise ConvertFailedError(f"cannot be read: {error.strerror}", str(dest)) from None
    if found:
        raise ConfigError(
            f"holds files ({', '.join(found[:3])}); DEST must be new or empty", str(dest)
        )


@contextmanager
def staged(dest: Path, source: Source, options: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder for the model, which becomes ``dest`` when the body ends.

    It has the complete shards of an earlier run of the same job: the same files of the source, and
    the same options. All files of any other job are deleted. Raises :class:`ConvertFailedError`
    when the folder cannot be written or another command uses it, and :class:`CheckpointError` when
    a file of the source is missing or changes meanwhile.
    """
    staging, begun = staging_folder(dest), _job(source, options)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise ConvertFailedError(f"cannot be created: {error.strerror}", str(staging)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _prepare(staging, begun)
        yield staging / _MODEL_FOLDER
        if _job(source, options) != begun:
            raise CheckpointError(
                "changed in the meantime; run the command again", str(source.path)
            )
        (staging / _MODEL_FOLDER).replace(dest.absolute())
        shutil.rmtree(staging)
    except BlockingIOError:
        raise ConvertFailedError("another command is using this folder", str(staging)) from None
    except OSError as error:
        raise ConvertFailedError(
            f"cannot be written: {error.strerror or error}; complete shards are kept: solve the "
            "problem, then run the same command again",
            str(staging),
        ) from None
    finally:
        os.close(lock)


def _job(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a command: the source's files with their stamps, and the options."""
    try:
        stats = [(str(file.resolve()), file.stat()) for file in source.files]
    except OSError as error:
        raise CheckpointError(f"has changed: {error}", str(source.path)) from None
    return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats], **options}


def is_whole(file: Path, shard: Shard) -> bool:
    """Return whether a shard exists with the expected names, shapes, dtypes and length."""
    expected = {piece.name: (piece.shape, piece.dtype) for piece in shard.pieces}
    try:
        with safe_open(str(file), framework="numpy") as opened:  # checks the file's length
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return expected == {
                name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
                for name, part in found.items()
            }
    except (SafetensorError, OSError):
        return False


def _prepare(staging: Path, wanted_job: dict[str, Any]) -> None:
    job_file, model = staging / _JOB_FILE, staging / _MODEL_FOLDER
    wanted_job = json.loads(json.dumps(wanted_job))
    try:
        is_same = json.loads(job_file.read_text(encoding="utf-8")) == wanted_job
    except (OSError, ValueError):
        is_same = False
    if not is_same:
        for found in staging.iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    model.mkdir(exist_ok=True)
    write_whole(job_file, json.dumps(wanted_job).encode())


def write_whole(file: Path, data: bytes) -> None:
    """Write a small file that exists completely or not at all."""
    unfinished = file.with_name(file.name + UNFINISHED)
    unfinished.write_bytes(data)
    finish(unfinished, file)


def finish(unfinished: Path, file: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    with unfinished.open("rb") as opened:
        os.fsync(opened.fileno())
    unfinished.replace(file)
