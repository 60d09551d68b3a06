"""The file of a deployment's keys: the SHA-256 of each, its name, and what it may be used for.

A key is 32 random bytes, so that its hash tells nobody the key, and needs no salt. No error
or log line here has a part of the file's content: somebody may have written a key into it.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from cluster.errors import ConfigError
from cluster.private_file import exposure
from router.section import Section
from router.security.limits import NO_LIMITS, KeyLimits

MAX_FILE_BYTES = 1024 * 1024
_HASH_ADVICE = "must be the SHA-256 of a key in 64 lower-case hex digits (`expertmesh keys new`)"


_REASONS = {"model_type": "must be a mapping", "tuple_type": "must be a list"}
NAME_RULE = "1 to 64 letters, digits and ._@-, the first a letter or digit"


class Role(enum.StrEnum):
    """What a key may be used for."""

    INFERENCE = "inference"
    ADMIN = "admin"
    METRICS = "metrics"


class KeyEntry(Section):
    """One key: its hash, the name of its owner, its roles, and the limits of that name.

    Several keys may have one name, and then share its limits.
    """

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
    roles: tuple[Role, ...] = Field(min_length=1)
    limits: KeyLimits = NO_LIMITS


class KeysDocument(Section):
    """The whole file."""

    keys: tuple[KeyEntry, ...]


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of a key, by name, the roles of that key, and the limits of the name."""

    name: str
    roles: frozenset[Role]
    limits: KeyLimits = NO_LIMITS


ANYBODY = Caller("", frozenset(Role))
"""Who calls a deployment without keys."""

Callers = Mapping[bytes, Caller]
"""The owner of each key, by the key's digest."""


def digest_of(key: str) -> bytes:
    """Return the digest by which :data:`Callers` knows a key."""
    return sha256(key.encode()).digest()


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's properties that change when it is written, replaced or opened to other users."""

    modified_ns: int
    inode: int
    num_bytes: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a file with this status."""
        return cls(status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)


def read_callers(file: Path) -> tuple[Callers, Stamp]:
    """Return the keys of a file, and its stamp from before it was read; see :func:`read_document`.

    Raises :class:`ConfigError`, also for a key that appears twice, and for two keys of one name
    with different limits.
    """
    document, stamp = read_document(file)
    callers: dict[bytes, Caller] = {}
    first_of: dict[str, int] = {}
    for index, entry in enumerate(document.keys):
        digest = bytes.fromhex(entry.sha256)
        if digest in callers:
            raise _wrong(file, f"keys[{index}].sha256 appears twice")
        first = first_of.setdefault(entry.name, index)
        limits = document.keys[first].limits
        if entry.limits != limits:
            raise _wrong(
                file, f"keys[{index}].limits differ from those of keys[{first}], of the same name"
            )
        callers[digest] = Caller(entry.name, frozenset(entry.roles), limits)
    return callers, stamp


def read_document(file: Path) -> tuple[KeysDocument, Stamp]:
    """Return a file's content and its stamp from before it was read.

    Raises :class:`ConfigError` that names the file and the reason: it cannot be read, others than
    its user and group may, it is malformed, or an entry is no hash of a key.
    """
    text, stamp = _read(file)
    try:
        return KeysDocument.model_validate(yaml.safe_load(text)), stamp
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise _wrong(file, f"is not YAML{place}") from None
    except yaml.YAMLError:
        raise _wrong(file, "is not YAML") from None
    except ValidationError as error:
        raise _wrong(file, _reason(error.errors()[0])) from None


def _read(file: Path) -> tuple[str, Stamp]:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            _check_status(file, status)
            return opened.read(MAX_FILE_BYTES + 1).decode("utf-8"), Stamp.of(status)
    except OSError as error:
        raise _wrong(file, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _wrong(file, "is not UTF-8") from None


def _check_status(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _wrong(file, "is no file")
    if reason := exposure(file):
        raise _wrong(file, reason)
    if status.st_size > MAX_FILE_BYTES:
        raise _wrong(file, f"has {status.st_size} bytes, at most {MAX_FILE_BYTES} are allowed")


def _reason(error: Any) -> str:
    """Return what is wrong in the file, without a value or an unknown key of it."""
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        section = _SECTIONS[len(location)]
        where = _path(location[:-1]) or "the file"
        return f"{where} has an unknown key; allowed are {', '.join(section.model_fields)}"
    if location and location[-1] == "sha256":
        return f"{_path(location)} {_HASH_ADVICE}"
    if location and location[-1] == "name":
        return f"{_path(location)} must be {NAME_RULE}"
    reason = _REASONS.get(error["type"]) or error["msg"]
    return f"{_path(location) or 'the file'}: {reason}"


_SECTIONS: Mapping[int, type[Section]] = {1: KeysDocument, 3: KeyEntry, 4: KeyLimits}
"""The section of the file whose keys have paths of so many parts."""


def _path(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")


def _wrong(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"{file}: {reason}", "security.keys_file")
