"""The tokens are the right ones: those of transformers, whoever else is served, however asked."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralForCausalLM

import deploy
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.quantization import FP8
from router.client import Sampling
from tests.cluster_fixture import (
    LAYERS,
    RANDOM,
    TINY,
    TOP_K,
    ServedCluster,
    greedy,
    prompt_of,
    transformers_tokens,
)


def test_greedy_tokens_of_the_bundled_model_equal_transformers(served: ServedCluster) -> None:
    folder = Path(deploy.__file__).parent / "models" / TINY
    oracle = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, count in (("In the beginning", 60), ("And God said, Let there be", 25), ("I", 40)):
        ids = tokenizer(text)["input_ids"]
        expected = transformers_tokens(oracle, ids, count)
        [reply] = served.client.generate(text, greedy(count), model=TINY)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(ids)
        assert reply.token_ids == expected
        assert reply.text == tokenizer.decode(expected)


def test_greedy_tokens_of_fp8_weights_alone_equal_transformers(served: ServedCluster) -> None:
    assert open_checkpoint(served.random_folder).stored == FP8
    for length, count in ((1, 30), (16, 17), (17, 16), (150, 40), (254, 1)):
        prompt = prompt_of(length, length)
        [reply] = served.client.generate(prompt, greedy(count), model=RANDOM)
        assert reply.token_ids == served.expected(prompt, count)


def test_a_crowd_of_32_mixed_lengths_gets_the_tokens_each_gets_alone(
    served: ServedCluster,
) -> None:
    sizes = [(1 + (7 * i) % 120, 2 + (5 * i) % 40) for i in range(32)]
    prompts = [prompt_of(length, 100 + i) for i, (length, _) in enumerate(sizes)]
    got = served.crowd(RANDOM, prompts, [greedy(count) for _, count in sizes])
    for prompt, (_, count), tokens in zip(prompts, sizes, got, strict=True):
        assert tokens == served.expected(prompt, count)


def test_both_models_at_once_do_not_disturb_each_other(served: ServedCluster) -> None:
    prompts = [prompt_of(5 + i, 200 + i) for i in range(6)]
    alone = [served.client.generate(p, greedy(15), model=TINY)[0].token_ids for p in prompts]
    tiny = served.client.stream(prompts[0], greedy(60), model=TINY, timeout_s=30)
    got = served.crowd(RANDOM, prompts, [greedy(15)] * 6)
    assert got == [served.expected(prompt, 15) for prompt in prompts]
    assert tuple(t for piece in tiny for t in piece.token_ids)[:15] == alone[0]
    assert served.crowd(TINY, prompts, [greedy(15)] * 6) == alone


def test_streams_lose_and_double_nothing(served: ServedCluster) -> None:
    sampling = Sampling(max_tokens=40, seed=5, n=3, ignore_eos=True)
    whole = served.client.generate("In", sampling, model=TINY)
    pieces = list(served.client.stream("In", sampling, model=TINY))
    for reply in whole:
        own = [piece for piece in pieces if piece.index == reply.index]
        assert tuple(t for piece in own for t in piece.token_ids) == reply.token_ids
        assert "".join(piece.text for piece in own) == reply.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["length"]
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_an_end_token_ends_the_text_unless_it_is_to_be_ignored(served: ServedCluster) -> None:
    # The random model's end token is 0: find a prompt whose greedy continuation has it.
    prompt, tokens = next(
        (prompt, tokens)
        for prompt in (prompt_of(6, seed) for seed in range(300, 400))
        if 0 in (tokens := served.expected(prompt, 60))
    )
    end = tokens.index(0)
    [ignoring] = served.client.generate(prompt, greedy(60), model=RANDOM)
    assert ignoring.token_ids == tokens
    obeying = Sampling(max_tokens=60, temperature=0.0)
    [reply] = served.client.generate(prompt, obeying, model=RANDOM)
    assert reply.finish_reason == "stop"
    assert reply.token_ids == tokens[: end + 1]


def test_a_seed_repeats_its_tokens_alone_and_in_a_crowd(served: ServedCluster) -> None:
    sampling = Sampling(max_tokens=25, seed=42, temperature=0.9, top_p=0.95, ignore_eos=True)
    prompt = prompt_of(9, 9)
    [alone] = served.client.generate(prompt, sampling, model=RANDOM)
    [other] = served.client.generate(
        prompt, Sampling(max_tokens=25, seed=43, ignore_eos=True), model=RANDOM
    )
    assert other.token_ids != alone.token_ids
    others = [prompt_of(3 + i, i) for i in range(7)]
    crowd = served.crowd(RANDOM, [prompt, *others], [sampling] * 8)
    assert crowd[0] == alone.token_ids


def test_only_the_chosen_experts_run(served: ServedCluster) -> None:
    for model, length, count in ((RANDOM, 20, 10), (TINY, 7, 30)):
        before = served.settled_tokens()
        served.client.generate(prompt_of(length, 1), greedy(count), model=model)
        computed = length + count - 1  # the last token is sampled, not computed
        # In the last layer only the tokens that are sampled from.
        rows = computed * (LAYERS[model] - 1) + count
        assert served.settled_tokens() == before + rows * TOP_K
