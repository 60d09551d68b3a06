"""Folders of prune, merge and upcycle, served beside the models of the session's cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ray import serve

from router.app import build
from tests.checkpoints import transformers_tokens
from tests.cluster_fixture import APP, ServedCluster, prompt_of
from tests.unit.workshop.folders.dense_models import save_dense
from tests.unit.workshop.folders.edits import write_letters
from tests.unit.workshop.folders.families import save, whole_model
from workshop.folders.dense_model import opened_dense
from workshop.folders.making import make_folder, source_checkpoint
from workshop.folders.merge.command import Merge
from workshop.folders.options import MergeOptions, PruneOptions, UpcycleOptions
from workshop.folders.prune.command import Prune
from workshop.folders.upcycle.command import Upcycle

FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3")
SIZES = ((1, 12), (30, 16), (90, 8))
PROMPTS = tuple((tuple(prompt_of(length, length)), count) for length, count in SIZES)
"""Prompts, and numbers of tokens that follow."""
FEW: dict[str, Any] = {"experts": 4, "sequences": 8, "sequence_length": 32}


def make_folders(families: Sequence[str], place: Path) -> dict[str, Path]:
    """Make a random model of each family, prune and merge it to half its experts."""
    folders, text = {}, write_letters(place / "letters.txt")
    for family in families:
        save(family, place / family)
        checkpoint = source_checkpoint(str(place / family))
        pruned, merged = (f"{family}-{command}" for command in ("pruned", "merged"))
        make_folder(Prune(checkpoint, PruneOptions(**FEW)), place / pruned, [text])
        make_folder(Merge(checkpoint, MergeOptions(**FEW)), place / merged, [text])
        folders |= {name: place / name for name in (pruned, merged)}
    return folders


def make_upcycled(place: Path) -> dict[str, Path]:
    """Make mixtures of random dense models, all parts and few parts of a token, and copies."""
    text = write_letters(place / "letters.txt")
    wanted = {
        "llama-all": UpcycleOptions(**FEW, shared=2),
        "qwen2-few": UpcycleOptions(**FEW, shared=2, active=2),
        "mistral-copies": UpcycleOptions(**FEW, by="copies"),
    }
    for name, options in wanted.items():
        family, dense = name.partition("-")[0], place / f"{name}-dense"
        save_dense(family, dense)
        with opened_dense(str(dense)) as model:
            make_folder(Upcycle(model, options), place / name, [text])
    return {name: place / name for name in wanted}


@cache
def expected_tokens(folder: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the greedy tokens of transformers' generate with the whole model of a folder."""
    return transformers_tokens(_oracle(folder), prompt, count)


@cache
def _oracle(folder: Path) -> Any:
    return whole_model(folder)


@contextmanager
def served_beside(cluster: ServedCluster, folders: Mapping[str, Path]) -> Iterator[ServedCluster]:
    """Deploy folders beside the cluster's own models; afterwards these alone."""
    models = [{"id": name, "path": str(folder)} for name, folder in folders.items()]
    args = {**cluster.args, "models": [*cluster.args["models"], *models]}
    served = replace(cluster, args=args)
    serve.run(build(args), name=APP, route_prefix="/")
    served.wait_whole()
    yield served
    serve.run(build(cluster.args), name=APP, route_prefix="/")
    cluster.wait_whole()
