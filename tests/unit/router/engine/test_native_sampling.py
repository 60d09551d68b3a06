"""Native code's sampling against torch's, and what both write and refuse."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate
from random import Random

import pytest
import torch

from router.engine import sampling

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 200, 4096])
def test_what_is_forbidden_is_minus_infinite_and_all_else_stays(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, is_native: bool
) -> None:
    if not is_native:
        monkeypatch.setattr(sampling, "native", None)
    generator = torch.Generator().manual_seed(vocab_size)
    for num_rows in (1, 2, 5):
        logits = torch.randn(num_rows, vocab_size, generator=generator)
        logits[0, 0] = torch.nan
        allowed = torch.rand(num_rows, vocab_size, generator=generator) < 0.5
        num_words = -(-vocab_size // 32) + 1  # the last has no token
        words = [
            [
                sum(int(of_row[i]) << i % 32 for i in range(32 * w, min(32 * w + 32, vocab_size)))
                for w in range(num_words)
            ]
            for of_row in allowed.tolist()
        ]
        given = torch.tensor(words).to(torch.uint32).view(torch.int32)
        before = logits.clone()
        found = sampling._where_allowed(logits, given)
        torch.testing.assert_close(logits, before, equal_nan=True, rtol=0, atol=0)
        expected = torch.where(allowed, logits, -torch.inf)
        expected[0, 0] = torch.nan  # also where it is forbidden
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_native_code_refuses_what_has_not_as_many_rows_or_too_few_words() -> None:
    if sampling.native is None:
        raise AssertionError("the native code is built where tests run")
    forbid, words, logits = sampling.native.forbid, bytes(8), bytes(8 * 33)
    for some, num_rows in ((words, 3), (words, 0), (words, -1), (b"", 2)):
        with pytest.raises(ValueError, match="words"):
            forbid(some, num_rows, logits, bytearray(len(logits)))
    with pytest.raises(ValueError, match="bit for each"):
        forbid(words, 2, logits, bytearray(len(logits)))  # 33 logits and 32 bits
    with pytest.raises(ValueError, match="rows"):
        forbid(words, 1, logits[:128], bytearray(124))
    with pytest.raises(OverflowError):
        forbid(words, 1 << 70, logits, bytearray(len(logits)))


def params_of(
    uniform: torch.Tensor,
    temperature: float = 1.0,
    top_k: float = INF,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Return ``warm_params`` of rows that are drawn by these numbers."""
    rows = [torch.full_like(uniform, x) for x in (temperature, top_k, top_p, min_p)]
    return torch.stack([*rows, uniform])


FILTERS: list[dict[str, float]] = [
    {},
    {"min_p": 0.05},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 1e-300},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 200, 4096])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_native_code_draws_the_tokens_that_torch_draws(
    vocab_size: int, filters: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for temperature in (1e-300, 0.3, 1.0, 5.0, 1e300):
        logits = 6 * torch.randn(50, vocab_size, generator=generator)
        logits[25:] = logits[25:].round()  # with equal ones
        logits[torch.rand(50, vocab_size, generator=generator) < 0.3] = -INF
        logits[:, vocab_size // 2] = 1.0
        uniform = torch.rand(50, generator=generator, dtype=torch.float64)
        uniform[0] = 2.0**-53
        params = params_of(uniform, temperature, **filters)
        found = sampling._draw(logits, params)
        torch.testing.assert_close(found, sampling._draw_by_torch(logits, params), rtol=0, atol=0)
        alone = [sampling._draw(logits[i : i + 1], params[:, i : i + 1]) for i in (0, 7)]
        assert torch.cat(alone).tolist() == found[[0, 7]].tolist()


def test_native_code_draws_by_shares_to_thirteen_digits() -> None:
    """Against exact sums of Python's exponentials: a number next to a token's bound decides."""
    random = Random(1)
    logits = [random.uniform(-30, 0) for _ in range(300)]
    rows = torch.tensor([logits])
    exact = [Fraction(math.exp(x)) for x in (rows - rows.amax())[0].tolist()]
    bounds = list(accumulate(exact))
    shares = [float(bound / bounds[-1]) for bound in bounds]
    for i, share in enumerate(shares[:-1]):
        if shares[i + 1] - share < 1e-12 or (i and share - shares[i - 1] < 1e-12):
            continue
        for uniform, expected in ((share * (1 - 1e-13), i), (share * (1 + 1e-13), i + 1)):
            params = params_of(torch.tensor([uniform], dtype=torch.float64))
            assert sampling._draw(rows, params).item() == expected


def test_the_number_next_to_one_draws_the_last_token_that_has_a_weight() -> None:
    logits = torch.full((1, 300), -INF)
    logits[0, 5], logits[0, 131] = 0.0, -1000.0
    params = params_of(torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert sampling._draw(logits, params).item() == 5
    logits[0, 130] = -10.0
    assert sampling._draw(logits, params).item() == 130


@pytest.mark.parametrize("row", [[NAN] * 70, [0.0] + [NAN] * 69, [INF] * 70, [-INF] * 70])
def test_native_code_draws_some_token_of_what_is_not_finite(row: list[float]) -> None:
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        params = params_of(torch.tensor([uniform], dtype=torch.float64))
        assert 0 <= sampling._draw(torch.tensor([row]), params).item() < len(row)


def test_native_drawing_refuses_what_has_not_as_many_rows() -> None:
    if sampling.native is None:
        raise AssertionError("the native code is built where tests run")
    draw, logits, params, out = sampling.native.draw, bytes(80), bytes(80), bytearray(16)
    draw(logits, params, 2, out)
    for arguments in (
        (logits, params, 3, out),
        (logits, params, 0, out),
        (logits, params, -1, out),
        (b"", params, 2, out),
        (logits, params[:72], 2, out),
        (logits[:76], params, 2, out),
        (logits, params, 2, bytearray(8)),
    ):
        with pytest.raises(ValueError, match="as many rows"):
            draw(*arguments)
    with pytest.raises(OverflowError):
        draw(logits, params, 1 << 70, out)
    with pytest.raises(BufferError):
        draw(logits, params, 2, bytes(16))
