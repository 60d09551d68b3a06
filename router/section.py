"""What the sections of a deployment file have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of a deployment file: unknown keys are errors, and nothing changes it later.

    The docstring of a section and the description of each key are what
    ``docs/configuration.md`` and ``expertmesh config schema`` say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
