"""What the engine's tests share: checkpoints of every family, each saved once, and clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import MixtralForCausalLM

from tests.checkpoints import save_mixtral
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok
from tests.local_cluster import LocalCluster

ALL: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}
FAMILIES = ["mixtral", *SAVERS]
"""Those that transformers has."""


class Saved(NamedTuple):
    """A checkpoint that tests only read, and what its saver returned: an oracle."""

    folder: Path
    model: Any


Saves = Callable[..., Saved]
OpenCluster = Callable[..., LocalCluster]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """Give a family's checkpoint, with other sizes where they are named."""

    @cache
    def save(family: str, **sizes: Any) -> Saved:
        folder = tmp_path_factory.mktemp(family)
        return Saved(folder, ALL[family](folder, **sizes))

    return save


@pytest.fixture(scope="session")
def folder(saved: Saves) -> Path:
    return saved("mixtral").folder


@pytest.fixture(scope="session")
def oracle(saved: Saves) -> MixtralForCausalLM:
    return saved("mixtral").model


@pytest.fixture
def open_cluster(folder: Path) -> Iterator[OpenCluster]:
    """Open clusters, of ``folder`` where no other ``of`` is named; they end with the test."""
    opened: list[LocalCluster] = []

    def opening(of: Path = folder, **options: Any) -> LocalCluster:
        opened.append(LocalCluster(of, **options))
        return opened[-1]

    yield opening
    for cluster in opened:
        cluster.close()


@pytest.fixture
def cluster(open_cluster: OpenCluster) -> LocalCluster:
    return open_cluster()
