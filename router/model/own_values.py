"""Values of a configuration that the model's class reads."""

from __future__ import annotations

from typing import Any


def own_value(config: Any, key: str) -> Any:
    """Return a value of transformers' configuration; ``None`` where its class lacks the key.

    transformers keeps every key of a file, also keys of other families, which no module reads.
    """
    return getattr(config, key, None) if hasattr(type(config), key) else None
