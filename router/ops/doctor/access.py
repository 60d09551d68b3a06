"""Judges who can use a cluster's Ray, and who can read what its nodes send: pure functions."""

from __future__ import annotations

from cluster.tls import NEEDS_RAY_TLS, RAY_TLS_VARIABLE
from router.ops.doctor.check import Check

TOKEN, ENCRYPTION = "token", "encryption"
"""The names of the checks."""
_RAY_TLS = (
    f"{RAY_TLS_VARIABLE}=1, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT before "
    "`ray start`"
)


def check_token(has_token: bool | None, exposed: str) -> Check:
    """Refuse a Ray without a token, also on loopback, and a token that other users may read.

    Serve's replicas listen on all interfaces wherever Ray itself listens, and without a token they
    unpickle what anybody sends. ``has_token`` says that Ray refuses who has no token; ``None`` is
    not known. ``exposed`` says why other users may use this user's token, empty if they may not.
    """
    if has_token is False:
        return Check(
            TOKEN,
            "problem",
            "Ray asks nobody for one: whoever reaches this machine may run any code as you",
            "Start Ray again with RAY_AUTH_MODE=token and one token (`umask 077; ray "
            "get-auth-token --generate`) on every node, and set both here.",
        )
    if exposed:
        found, _, advice = exposed.partition("; ")
        return Check(TOKEN, "problem", found, advice[:1].upper() + advice[1:])
    if has_token is None:
        return Check(TOKEN, "warning", "it is not known whether Ray asks for one")
    return Check(TOKEN, "ok", "Ray asks for it")


def check_encryption(num_nodes: int, has_ray_tls: bool, has_tls: bool) -> Check:
    """Refuse ``experts.tls`` without Ray's TLS, and warn of several nodes that lack one of them.

    ``num_nodes`` is 0 if it is not known. ``has_tls`` says whether any application has
    ``experts.tls``.
    """
    if has_tls and not has_ray_tls:
        advice = f"Give Ray its TLS on every node ({_RAY_TLS}), or leave experts.tls out."
        return Check(ENCRYPTION, "problem", f"experts.tls {NEEDS_RAY_TLS}", advice)
    if num_nodes > 1 and not has_ray_tls:
        found = f"{num_nodes} nodes send each other prompts and tokens in plain text"
        advice = f"Give Ray its TLS on every node ({_RAY_TLS}), and set experts.tls."
        return Check(ENCRYPTION, "warning", found, advice)
    if num_nodes > 1 and not has_tls:
        found = "Ray's calls are encrypted; streams and links between nodes are not"
        return Check(ENCRYPTION, "warning", found, "Set experts.tls.")
    return Check(ENCRYPTION, "ok", "Ray's calls, streams, links" if has_tls else "not asked for")
