"""Files with secrets: whether other users of this machine may read, change or replace one."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def exposure(file: Path, forbidden: int = stat.S_IRWXO) -> str:
    """Return why other users may use a secret file and what to run; empty if they may not.

    The file and all folders above belong to this user or root, and only a sticky folder may be
    writable by everybody. ``forbidden`` are the permissions that the file itself must not have.
    Raises ``OSError`` for a file that cannot be looked at.
    """
    real = file.resolve()
    status = real.stat()
    if status.st_mode & forbidden:
        mode = stat.S_IMODE(status.st_mode)
        return f"may be used by other users (mode {mode:04o}); run: chmod 600 {file}"
    if not _is_ours(status):
        return f"belongs to user {status.st_uid}; run: chown {os.geteuid()} {file}"
    for folder in {*real.parents, *file.absolute().parents}:
        status = folder.stat()
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"may be replaced by other users; run: chmod o-w {folder}"
        if not _is_ours(status):
            return f"may be replaced by user {status.st_uid}, the owner of {folder}; move the file"
    return ""


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())
