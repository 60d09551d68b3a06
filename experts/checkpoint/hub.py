"""Models of the Hugging Face hub: their ids, and their folders in the hub's local cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"({_REPOSITORY})(?:@(.*))?", re.ASCII | re.DOTALL)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]{0,254}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r"models--([^-].*?)--(.+)")
FILES = [
    "*.safetensors", "*.json", "tokenizer.model", "*.jinja", "mixture.yaml", "*.skops", "*.onnx"
]  # fmt: skip
DESCRIPTION = ("config.json", "*.index.json", "mixture.yaml")
_FOLDERS = ["*/*"]
"""Folders that are not fetched: the same weights in other layouts, as in GPT-OSS."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, ``owner/name``, and a commit, tag or branch of it.

    Without a revision it is the newest commit of the repository's main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_id(text: str) -> HubId | None:
    """Read ``owner/name`` or ``owner/name@revision``; ``None`` for a text of another form.

    Raises :class:`ValueError` for a repository with a wrong revision.
    """
    found = _HUB_ID.fullmatch(text)
    if found is None:
        return None
    revision = found[2]
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ValueError(
            "the revision after @ must be a commit, tag or branch of at most 255 letters, digits "
            f"and ._/+-, without two dots in a row (given: {revision!r:.80})"
        )
    return HubId(found[1], revision)


def fetch(model: HubId, patterns: Sequence[str] = FILES) -> Path:
    """Fetch a model's files into the hub's local cache; returns their folder there.

    With :data:`DESCRIPTION` these are the files without weights. Pickles and folders in the
    repository are left out. Raises what the hub's client raises, which has no common class.
    """
    from huggingface_hub import snapshot_download  # slow to import and seldom needed

    return Path(
        snapshot_download(
            model.repository,
            revision=model.revision,
            allow_patterns=list(patterns),
            ignore_patterns=_FOLDERS,
        )
    )


def cached_id(folder: Path) -> HubId | None:
    """Return repository and commit of a folder in the hub's cache, ``None`` for another folder."""
    repository = _CACHED.fullmatch(folder.parent.parent.name)
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    if repository is None or not is_snapshot:
        return None
    return HubId(f"{repository[1]}/{repository[2]}", folder.name)


def name_of(folder: Path) -> str:
    """Return what a model's folder is called: by repository and commit in the hub's cache."""
    cached = cached_id(folder)
    return folder.name if cached is None else str(cached)


def why_not_fetched(error: Exception) -> str:
    """Return why the hub's client did not fetch a model, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private: mend the name or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such revision"
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return "no network: the hub does not answer, and the model is not in its local cache"
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
