"""Models of the hub: their ids with revisions, their cache on this machine, and no pickles.

The hub's own client resolves the revisions, in a cache that a test fills, without a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

import deploy
from cluster.errors import CheckpointError, CheckpointMissingError, ConfigError
from experts.checkpoint.hub import HubId, cached_id, name_of, parse_hub_id
from experts.checkpoint.remote.remote_files import open_model
from experts.checkpoint.shards import PICKLE_SUFFIXES
from experts.checkpoint.stored import pinned_path, resolve_folder
from router.config.deployment import parse_args
from router.served import inspect_models
from workshop.folders.making import origin_of, source_checkpoint

TINY = Path(deploy.__file__).parent / "models" / "mesh-tiny"
OLD, NEW = "0" * 40, "1" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a repository with two commits, a branch, a tag and a pull request."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--na.me"
    for commit in (OLD, NEW):
        shutil.copytree(TINY, repository / "snapshots" / commit)
    for name, commit in {"main": NEW, "v1": OLD, "refs/pr/3": OLD, "feature/x+y": NEW}.items():
        file = repository / "refs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit)
    return repository / "snapshots"


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        *(("", NEW), ("@main", NEW), ("@v1", OLD), (f"@{OLD}", OLD)),
        *(("@refs/pr/3", OLD), ("@feature/x+y", NEW)),
    ],
)
def test_a_hub_id_is_resolved_to_the_commit_of_its_revision(
    cache: Path, revision: str, commit: str
) -> None:
    folder = resolve_folder(f"owner/na.me{revision}")
    assert folder == cache / commit
    assert cached_id(folder) == HubId("owner/na.me", commit)
    assert name_of(folder) == f"owner/na.me@{commit}"
    # A folder that is made of it names repository and commit of its source.
    source = source_checkpoint(f"owner/na.me{revision}")
    assert origin_of(source)["source"] == f"owner/na.me@{commit}"
    for path in (str(folder), "models/mesh-tiny"):
        assert pinned_path(path, open_model(path, None, None)) == path


@pytest.mark.parametrize("path", [f"owner/na.me@{'2' * 40}", "owner/na.me@v2", "owner/other@v1"])
def test_a_revision_that_the_hub_lacks_is_named(cache: Path, path: str) -> None:
    with pytest.raises(CheckpointMissingError, match="was not fetched from the hub") as caught:
        resolve_folder(path)
    assert caught.value.field == path


@pytest.mark.parametrize(
    "revision",
    ["", " ", "a b", "v1 ", " v1", "v1\n", "../main", "a..b", "-x", "@", "v1@v2", "x" * 256],
)
def test_a_wrong_revision_is_refused_by_key_and_by_command(revision: str) -> None:
    path = f"owner/name@{revision}"
    with pytest.raises(ConfigError, match="the revision after @ must be") as refused:
        parse_args({"models": [{"id": "a", "path": path}]})
    assert refused.value.field == "args.models[0].path"
    with pytest.raises(CheckpointError, match="the revision after @ must be"):
        source_checkpoint(path)


@pytest.mark.parametrize("path", ["/a b/c@", "a/b/c", "name@v1", "@v1", "a/b\n", "", "../x@v1"])
def test_other_texts_are_no_hub_ids(path: str) -> None:
    assert parse_hub_id(path) is None


def test_folders_with_an_at_are_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    absolute = tmp_path / "owner" / "na.me@v1"
    shutil.copytree(TINY, absolute)
    assert resolve_folder(str(absolute)) == absolute
    assert pinned_path(str(absolute), open_model(str(absolute), None, None)) == str(absolute)
    # A folder of the deploy package goes before the hub, and a command's own before both.
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    assert resolve_folder("owner/na.me@v1") == absolute
    assert resolve_folder("owner/na.me@main") == cache / NEW
    monkeypatch.chdir(tmp_path)
    assert source_checkpoint(str(absolute.relative_to(tmp_path))).folder == absolute


def test_every_process_of_a_deployment_gets_the_commit_of_its_start(cache: Path) -> None:
    config = parse_args({"models": [{"id": "a", "path": "owner/na.me@main"}]})
    [model] = inspect_models(config)
    assert model.path == f"owner/na.me@{NEW}"
    (cache.parent / "refs" / "main").write_text(OLD)  # the branch moves
    assert resolve_folder(config.models[0].path) == cache / OLD
    assert resolve_folder(model.path) == cache / NEW


@pytest.mark.parametrize("change", [str.upper, lambda name: name[:-1], lambda name: f"{name}0"])
def test_a_folder_that_only_looks_like_the_cache_has_its_own_name(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / change("a" * 40)
    assert name_of(folder) == folder.name
    assert cached_id(tmp_path / "owner" / "snapshots" / ("a" * 40)) is None
    assert cached_id(tmp_path / "models--owner--name" / "blobs" / ("a" * 40)) is None


def test_a_hub_that_cannot_be_reached_is_a_checkpoint_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unreachable = Mock(side_effect=ConnectionError("a fault of the test's"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="was not fetched from the hub") as caught:
        resolve_folder("owner/name")
    assert caught.value.field == "owner/name"
    [((hub_id,), options)] = unreachable.call_args_list
    assert (hub_id, options.pop("revision")) == ("owner/name", None)
    # Neither pickles nor the same weights once more in a folder are fetched.
    wanted = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model"]
    pickles = [f"pytorch_model{suffix}" for suffix in PICKLE_SUFFIXES]
    copies = ["original/model.safetensors", "original/config.json", "metal/model.bin"]
    assert list(filter_repo_objects([*wanted, *pickles, *copies], **options)) == wanted
