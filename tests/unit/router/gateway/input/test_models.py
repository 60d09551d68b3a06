"""A gateway's models: the tokenizer that it loads is that of the served checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from router.config.deployment import parse_args
from router.gateway.input.tokenizer import Tokenizer, load_models
from router.served import inspect_models
from tests.checkpoints import save_mixtral, save_tokenizer
from tests.family_checkpoints import SAVERS
from tests.grok_oracle import save_grok


def test_a_tokenizer_that_changed_since_the_check_is_refused(tmp_path: Path) -> None:
    save_mixtral(tmp_path)
    config = parse_args({"models": [{"id": "m", "path": str(tmp_path)}]})
    [model] = inspect_models(config)
    assert load_models((model,), None)["m"].tokenizer.encode("in")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="its tokenizer, chat template or") as caught:
        load_models((model,), None)
    assert caught.value.field == str(tmp_path)
    # Another deployment serves it, under the same weights' key.
    [again] = inspect_models(config)
    assert again.key == model.key
    assert again.identity != model.identity
    assert load_models((again,), None)["m"].info == replace(again)


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
