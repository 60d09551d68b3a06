"""Judges who can use a cluster's Ray, and who can read what its nodes send: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.tls import NEEDS_RAY_TLS, RAY_TLS_VARIABLE
from router.ops.doctor.check import Check
from router.security.reach import is_loopback

TOKEN, ENCRYPTION = "token", "encryption"
"""The names of the checks."""
_RAY_TLS = (
    f"{RAY_TLS_VARIABLE}=1, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT before "
    "`ray start`"
)


def check_token(addresses: Sequence[str] | None, has_token: bool | None, exposed: str) -> Check:
    """Refuse a Ray without a token that other machines reach, and a token that other users read.

    ``addresses`` are those that the nodes of the joined cluster listen on, or the one of a Ray that
    a start makes. ``has_token`` says that Ray refuses who has no token; ``None`` is not known.
    ``exposed`` says why other users may read this user's token, empty if they may not.
    """
    if has_token is None:
        return Check(TOKEN, "warning", "it is not known whether Ray asks for one")
    if has_token:
        found, _, advice = (exposed or "Ray asks for it").partition("; ")
        return Check(TOKEN, "problem" if exposed else "ok", found, advice.capitalize())
    beyond = [one for one in addresses or () if not is_loopback(one)]
    if addresses and not beyond:
        found = "Ray asks nobody for one: every user of this machine may run code as you"
        return Check(TOKEN, "warning", found, "Start it with RAY_AUTH_MODE=token.")
    where = f" on {', '.join(beyond)}" if beyond else ""
    return Check(
        TOKEN,
        "problem",
        f"Ray listens{where} and asks nobody for a token: whoever reaches its ports runs any code",
        "Start Ray again with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`) "
        "on every node, and set both here.",
    )


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
