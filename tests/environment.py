"""The variables of programs that tests start."""

from __future__ import annotations

import os


def without_ray() -> dict[str, str]:
    """Return this process's variables without Ray's own, except for the file of its token."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") or name == "RAY_AUTH_TOKEN_PATH"
    }
