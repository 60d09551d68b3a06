"""The tokenizers of all families' folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router.gateway.input.tokenizer import Tokenizer
from tests.checkpoints import save_mixtral, save_tokenizer
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok

ALL: dict[str, Callable[[Path], Any]] = {"mixtral": save_mixtral, "grok": save_grok, **SAVERS}


@pytest.mark.parametrize("family", ALL)
def test_a_tokenizer_is_loaded_beside_its_familys_configuration(
    tmp_path: Path, family: str
) -> None:
    ALL[family](tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    ids = tokenizer.encode("the lazy dog", add_special_tokens=False)
    assert tokenizer.decode(ids) == "the lazy dog"
