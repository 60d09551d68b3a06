"""What a failed call to an expert actor means, and how it is said in a line of the log."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError


def cause_of(error: RayTaskError) -> Exception:
    """Return the actor's own exception instead of Ray's wrapper with its stack."""
    cause = error.cause
    return cause if isinstance(cause, Exception) else error


def kind_of(error: BaseException) -> str:
    """Return an error's class by name."""
    return type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return what is said of an actor that is replaced because of an error."""
    if isinstance(error, TimeoutError):
        return "does not answer; replacing it"
    if isinstance(error, RayActorError):
        return "died; replacing it"
    return f"{kind_of(error)}; replacing it"
