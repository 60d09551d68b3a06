"""Changes to a file of keys: a new key, a revoked one. The file is replaced as a whole."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import yaml
from pydantic import ValidationError

from cluster.errors import ConfigError, shown
from router.security.keys import NAME_RULE, KeyEntry, KeysDocument, Role, read_document
from router.security.limits import NO_LIMITS, KeyLimits

PREFIX = "em-"
"""Of each key, so that scanners for secrets know one when they see it."""
LOCK_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.05
_HEADER = (
    "# The SHA-256 of each key, and what the key is for; the keys themselves are not here.\n"
    "# `expertmesh keys` writes this file anew, without comments.\n"
)
_HASH_BEGINNING = re.compile(r"[0-9a-f]{8,64}")
_PRIVATE = 0o600


def add_key(file: Path, name: str, roles: Sequence[Role], limits: KeyLimits | None = None) -> str:
    """Add a new key to a file, which is made if it is not there; returns the key.

    Without ``limits`` it has those of the name's other keys. Raises :class:`ConfigError` where
    these have others than ``limits``, and where the file cannot be used or written.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    with _locked(file):
        known = read_document(file)[0].keys if file.exists() else ()
        of_name = next((entry.limits for entry in known if entry.name == name), None)
        if limits is None:
            limits = of_name or NO_LIMITS
        elif of_name not in (None, limits):
            raise ConfigError(
                f"the keys of {name} have other limits; leave the limits out to have the same, or "
                f"change {file} by hand for all of them",
                "limits",
            )
        _replace(file, (*known, _entry(key, name, roles, limits)))
    return key


def _entry(key: str, name: str, roles: Sequence[Role], limits: KeyLimits) -> KeyEntry:
    digest, roles = sha256(key.encode()).hexdigest(), tuple(dict.fromkeys(roles))
    try:
        return KeyEntry(sha256=digest, name=name, roles=roles, limits=limits)
    except ValidationError:
        raise ConfigError(f"must be {NAME_RULE}; got {shown(name)}", "name") from None


def revoke(file: Path, which: str) -> list[KeyEntry]:
    """Remove all keys of a name, or those whose hash begins so; returns what was removed.

    The beginning of a hash has 8 hex digits at least. Raises :class:`ConfigError` where no key is
    meant, or both by its name and by its hash, and where the file cannot be used or written.
    """
    with _locked(file):
        entries = read_document(file)[0].keys
        named = [entry for entry in entries if entry.name == which]
        is_beginning = _HASH_BEGINNING.fullmatch(which) is not None
        hashed = [e for e in entries if is_beginning and e.sha256.startswith(which)]
        if named and hashed:
            raise ConfigError(f"{which} is the name of a key and the hash of a key", str(file))
        gone = named or hashed
        if not gone:
            names = ", ".join(sorted({entry.name for entry in entries})) or "none"
            raise ConfigError(f"no key has the name or hash {which!r}; names: {names}", str(file))
        _replace(file, [entry for entry in entries if entry not in gone])
    return gone


def _replace(file: Path, entries: Sequence[KeyEntry]) -> None:
    """Write a file, which keeps its mode and its owner; a reader sees the old or the new one."""
    file = file.resolve()  # a link goes on being one
    document = KeysDocument(keys=tuple(entries)).model_dump(mode="json", exclude_defaults=True)
    text = _HEADER + yaml.safe_dump(document, sort_keys=False)
    try:
        earlier = file.stat() if file.exists() else None
        descriptor, part = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
                opened.write(text)
                os.fchmod(opened.fileno(), stat.S_IMODE(earlier.st_mode) if earlier else _PRIVATE)
                if earlier is not None:
                    os.fchown(opened.fileno(), earlier.st_uid, earlier.st_gid)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(part, file)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part)
            raise
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(file)) from None


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other commands from changing a file of the same folder meanwhile."""
    try:
        folder = os.open(file.resolve().parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(file)) from None
    try:
        _lock(folder, file)
        yield
    finally:
        os.close(folder)  # which unlocks it


def _lock(folder: int, file: Path) -> None:
    until_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise ConfigError("another command writes it", str(file)) from None
            time.sleep(_LOCK_POLL_S)
