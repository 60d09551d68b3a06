"""What an engine emits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import ExpertMeshError
from router.messages.request import TokenEvent


@dataclass(frozen=True, slots=True)
class Emission:
    """A step's outcome for one request: tokens of a choice, or the error that ended the request."""

    request_id: str
    outcome: TokenEvent | ExpertMeshError


Emit = Callable[[list[Emission]], None]
