"""What the engine's tests share: checkpoints of every family, each saved once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok

_SAVERS: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}


class Saved(NamedTuple):
    """A checkpoint that tests only read, and what its saver returned: an oracle."""

    folder: Path
    model: Any


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Give a family's checkpoint, with other sizes where they are named."""

    @cache
    def save(family: str, **sizes: int) -> Saved:
        folder = tmp_path_factory.mktemp(family)
        return Saved(folder, _SAVERS[family](folder, **sizes))

    return save
