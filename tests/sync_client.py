"""Write ``router/client/sync.py``, the synchronous client, from the asynchronous ``aio.py``.

python -m tests.sync_client
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "router" / "client"
_SUBSTITUTIONS = (
    (r"\A.*", '"""The synchronous client; ``python -m tests.sync_client`` makes it of ``aio.py``.'),
    (
        "an asynchronous context manager, for the loop that makes it",
        "a thread-safe context manager",
    ),
    (r"AsyncGenerator\[Reply, None\]", "Generator[Reply, None, None]"),
    ("AsyncGenerator", "Generator"),
    ("AsyncSession", "SyncSession"),
    ("AsyncClient", "Client"),
    ("__a(enter|exit)__", r"__\1__"),
    ("aclosing", "closing"),
    (r"\b(async|await) ", ""),
)
"""Regular expressions and their replacements, in this order."""


def synchronous(source: str) -> str:
    """Return the synchronous client's source; raises ``ValueError`` for a pattern not found."""
    for pattern, replacement in _SUBSTITUTIONS:
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise ValueError(f"aio.py has no {pattern!r}: remove or mend the substitution")
    return source


if __name__ == "__main__":
    made = synchronous((FOLDER / "aio.py").read_text(encoding="utf-8"))
    (FOLDER / "sync.py").write_text(made, encoding="utf-8")
