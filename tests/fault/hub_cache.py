"""A hub cache for each simulated node, as machines without a network have them."""

from __future__ import annotations

from pathlib import Path

HUB_ID = "mesh/random"


def cache_environment(home: Path) -> dict[str, str]:
    """Return what makes a process use the cache in ``home``, and no network."""
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def make_cache(home: Path) -> Path:
    """Make a cache with a model named :data:`HUB_ID`; returns where its files are to lie."""
    revision = "0" * 40
    repository = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return repository / "snapshots" / revision
