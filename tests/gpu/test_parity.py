"""Every family on the accelerator against transformers there: fp32 tokens, bf16 distances."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.parity import FAMILIES, compare


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_on_the_device_as_transformers_does(
    device: torch.device, family: str
) -> None:
    parity = compare(family, device)
    assert parity.equal_tokens == parity.tokens > 0
    assert parity.distance <= parity.most_distance


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_long_prompts_are_computed_as_transformers_does_too(
    device: torch.device, family: str
) -> None:
    prompts = [tuple(range(3, 103)), tuple(range(200, 60, -1))]
    parity = compare(family, device, prompts=prompts)
    assert parity.tokens > 0
    assert parity.is_kept


@pytest.mark.timeout(120)
def test_prompts_of_several_pages_are_computed_beside_short_ones(device: torch.device) -> None:
    """Variable-length attention has pages of 256 tokens; two prompts take their pages by turns."""
    prompts = [tuple(3 + (i * step) % 300 for i in range(600)) for step in (1, 7)]
    parity = compare("mixtral", device, prompts=[*prompts, (5, 9, 7)])
    assert parity.may_read_pages
    assert parity.attention == "varlen"
    assert parity.tokens > 0
    assert parity.is_kept
