"""transformers, imported without libraries that a router never calls.

transformers imports scipy for the losses of object detection, and Pillow for images. Both take some
memory of a router for nothing. transformers keeps the answer of its first search for a library, so
they stay out of a process that imports transformers' models here first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("scipy", "PIL")


@contextmanager
def unused_hidden() -> Iterator[None]:
    """Keep :data:`UNUSED` from being imported; a library that is imported already stays.

    Where transformers is imported already, nothing is hidden: it may have found the libraries.
    """
    is_first = "transformers" not in sys.modules
    hidden = [name for name in UNUSED if is_first and name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # import and find_spec see no library
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with unused_hidden():
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

__all__ = ["ALL_ATTENTION_FUNCTIONS", "PreTrainedModel", "transformers"]
