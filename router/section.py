"""What the sections of a deployment file have in common."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of a deployment file: unknown keys are errors, and nothing changes it later.

    The docstring of a section and the description of each key are what
    ``docs/configuration.md`` and ``expertmesh config schema`` say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Return the error for a key that a section does not have: the nearest key, and all."""
    keys = sorted(allowed)
    near = get_close_matches(key, keys, 1)
    hint = f"did you mean {near[0]}? Allowed keys" if near else "allowed keys"
    return f"unknown key; {hint}: {', '.join(keys)}"


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in the type of a key, which may be optional or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]
