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


def check_token(num_nodes: int | None, is_open: bool, has_token: bool | None) -> Check:
    """Refuse a Ray that other machines reach and that asks for no token.

    ``num_nodes`` are those of the cluster that a start joins, 1 for a Ray of its own. ``is_open``
    says that a gateway listens on another host than loopback, ``has_token`` that Ray refuses who
    has no token. ``None`` is not known.
    """
    if not _are_several(num_nodes) and not is_open:
        return Check(TOKEN, "ok", "one machine, on loopback")
    if has_token is None:
        return Check(TOKEN, "ok", "not known of this cluster")
    if has_token:
        return Check(TOKEN, "ok", "Ray asks for it")
    why = f"{num_nodes} nodes" if _are_several(num_nodes) else "a gateway listens beyond loopback"
    return Check(
        TOKEN,
        "problem",
        f"{why}, and Ray asks nobody for a token: whoever reaches its ports runs any code",
        "Start Ray again with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`) "
        "on every node, and set both here.",
    )


def check_encryption(num_nodes: int | None, has_ray_tls: bool, has_tls: bool) -> Check:
    """Refuse ``experts.tls`` without Ray's TLS, and warn of several nodes that lack one of them.

    ``has_tls`` says whether any application has ``experts.tls``.
    """
    if has_tls and not has_ray_tls:
        advice = f"Give Ray its TLS on every node ({_RAY_TLS}), or leave experts.tls out."
        return Check(ENCRYPTION, "problem", f"experts.tls {NEEDS_RAY_TLS}", advice)
    if _are_several(num_nodes) and not has_ray_tls:
        found = f"{num_nodes} nodes send each other prompts and tokens in plain text"
        advice = f"Give Ray its TLS on every node ({_RAY_TLS}), and set experts.tls."
        return Check(ENCRYPTION, "warning", found, advice)
    if _are_several(num_nodes) and not has_tls:
        found = "Ray's calls are encrypted; streams and links between nodes are not"
        return Check(ENCRYPTION, "warning", found, "Set experts.tls.")
    return Check(ENCRYPTION, "ok", "Ray's calls, streams, links" if has_tls else "not asked for")


def _are_several(num_nodes: int | None) -> bool:
    return num_nodes is not None and num_nodes > 1
