"""What a target of the fuzzing is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.errors import ExpertMeshError

MAX_MESSAGE_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """A part that takes bytes from outside.

    ``run`` gives it some, as good as ``seeds`` or not, and raises whatever is a finding: anything
    but the refusals that the part promises, and an answer that cannot be right.
    """

    seeds: Sequence[bytes]
    run: Callable[[bytes], None]


def check_refusal(error: ExpertMeshError, where: str = "") -> None:
    """Check that an error can be shown, short and on one line, and that its field is ``where``."""
    assert error.field.startswith(where), f"names {error.field!r}"
    assert error.message, "an error without a message"
    assert len(str(error)) < MAX_MESSAGE_CHARS, f"an error of {len(str(error))} characters"
    assert "\n" not in error.message, "an error on several lines"
