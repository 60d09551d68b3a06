"""Files with secrets: whether other users of this machine may read, change or replace one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def exposure(file: Path, forbidden: int = stat.S_IWGRP | stat.S_IRWXO) -> str:
    """Return why other users may use a secret file and what to run; empty if they may not.

    The file, and each folder and link on the way to it, belong to this user or root. Only a sticky
    folder may be writable by others, or by a group that others are in. ``forbidden`` are the
    permissions that the file itself must not have. Raises ``OSError`` for a file that cannot be
    looked at.
    """
    status = file.stat()
    if status.st_mode & forbidden:
        mode = stat.S_IMODE(status.st_mode)
        return f"may be used by other users (mode {mode:04o}); run: chmod 600 {file}"
    if not _is_ours(status):
        return f"belongs to user {status.st_uid}; run: chown {os.geteuid()} {file}"
    for one in _way_to(file.absolute()):
        status = one.lstat()
        if not _is_ours(status):
            return f"may be replaced by user {status.st_uid}, the owner of {one}; move the file"
        if others := _writers(status):
            return f"may be replaced by other users; run: chmod {others}-w {one}"
    return ""


def _way_to(path: Path) -> Iterator[Path]:
    """Yield a path, all folders above, and the ways to which links among them lead."""
    for one in (path, *path.parents):
        yield one
        if one.is_symlink():
            yield from _way_to(one.parent / one.readlink())


def _writers(status: os.stat_result) -> str:
    """Return who else may replace what is in a folder, as ``chmod`` calls them."""
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return ""
    of_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return ("g" if of_group else "") + ("o" if status.st_mode & stat.S_IWOTH else "")


def _is_own_group(gid: int) -> bool:
    """Return whether a group is root's or this user's own, without other members."""
    import grp  # not on Windows, where clients run
    import pwd

    try:
        group, names = grp.getgrgid(gid), {"root", pwd.getpwuid(os.geteuid()).pw_name}
    except KeyError:
        return False
    return group.gr_name in names and names.issuperset(group.gr_mem)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())
