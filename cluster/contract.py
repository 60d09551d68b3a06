"""What a deployment or a request may ask for when an expert has no live copy."""

from __future__ import annotations

from typing import Literal, get_args

OnExpertLoss = Literal["strict", "next_expert", "drop"]
"""``strict`` waits for the expert: the answer is exact or an error. ``next_expert`` has the next
live expert in line take the token. ``drop`` leaves the expert's share out. See
``router/moe/missing.py``.
"""

ON_EXPERT_LOSS: tuple[str, ...] = get_args(OnExpertLoss)
EXACT_KEY = "expertmesh-exact"
"""gRPC's trailing metadata that says ``true`` or ``false`` of a whole answer; HTTP's header has an
``x-`` before it."""
