"""Perplexity of a folder and of a served model against transformers, by text and by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cluster.errors import ConfigError, OverloadedError
from experts.checkpoint.checkpoint import open_checkpoint
from router.gateway.input.tokenizer import Tokenizer
from tests.checkpoints import save_mixtral, transformers_tokens
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc
from workshop.evaluate.local_model import FolderModel
from workshop.evaluate.run import Evaluation, Served, evaluate
from workshop.texts import Sequences, beginning, read_blocks

FAMILIES: dict[str, Callable[..., Any]] = {"mixtral": save_mixtral, **SAVERS}
WORDS = ("the", "quick", "brown fox", "jumps over", "a", "dog — and", "things:", "中文 ünter", "42")
LENGTH = 40
TINY = Path(__file__).parents[4] / "deploy" / "models" / "mesh-tiny"


def text_of(seed: int, num_lines: int = 12) -> str:
    source = np.random.default_rng(seed)
    return "".join(" ".join(source.choice(WORDS, 9)) + "\n" for _ in range(num_lines))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    written = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for seed, path in enumerate(written):
        path.write_text(text_of(seed), encoding="utf-8")
    return written


def quiet(name: str, done: int, total: int) -> None:
    """Show no progress."""


def evaluated(folder: Path, paths: list[Path], served: Served | None = None) -> Evaluation:
    return evaluate(folder, paths, LENGTH, served, quiet)


def sequences_of(folder: Path, path: Path) -> list[list[int]]:
    """Cut a text as the documentation says, by transformers' tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = path.read_text(encoding="utf-8")
    start = tokenizer("")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    window = LENGTH - len(start)
    return [
        [*start, *ids[begin : begin + window]] for begin in range(0, len(ids) - window + 1, window)
    ]


def nats_of(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Return the nats of all tokens but the first of each sequence, [sequences, LENGTH - 1]."""
    ids = torch.tensor(sequences)
    with torch.inference_mode():
        logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return -logprobs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss"])
def test_a_served_model_has_the_folders_perplexity(
    tmp_path: Path, paths: list[Path], family: str
) -> None:
    folder = tmp_path / "model"
    FAMILIES[family](folder)
    expected = evaluated(folder, paths)
    cluster = LocalCluster(folder, identity="one")
    with serve_grpc(LocalGateway(folder, cluster)) as address:
        found = evaluated(folder, paths, Served(address, "", 30.0))
    cluster.close()
    assert found.model == "m"
    for name, figures in found.texts.items():
        assert figures.nats == pytest.approx(expected.texts[name].nats, rel=1e-7)
        assert figures.tokens == expected.texts[name].tokens
        assert figures.experts == []


def test_a_server_that_is_full_is_asked_again(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_mixtral(folder)
    cluster = LocalCluster(folder, identity="one")
    gateway = LocalGateway(folder, cluster)
    take, refusals = gateway.upstream.generate, iter([True, False, True, True])

    def often_full(request: Any) -> Any:
        if next(refusals, False):
            raise OverloadedError("the routers are full", "queue", 0.01)
        return take(request)

    monkeypatch.setattr(gateway.upstream, "generate", often_full)
    with serve_grpc(gateway) as address:
        found = evaluated(folder, paths, Served(address, "", 30.0))
        refusals = iter([True] * 99)
        with pytest.raises(OverloadedError):
            evaluated(folder, paths, Served(address, "", 0.05))
    cluster.close()
    assert found.texts.keys() == {"one.txt", "two.txt"}


def test_experts_have_the_shares_and_the_perplexity_of_their_tokens(
    tmp_path: Path, paths: list[Path]
) -> None:
    folder = tmp_path / "model"
    model = save_mixtral(folder)
    found = evaluated(folder, paths[:1]).texts["one.txt"]
    sequences = sequences_of(folder, paths[0])
    nats = nats_of(model, sequences)
    taken = np.zeros((3, 8), int)
    lost = np.zeros((3, 8))
    for sequence, row in zip(sequences, nats, strict=True):
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor([sequence]), use_cache=False, output_router_logits=True
            )
        for layer, logits in enumerate(output.router_logits):
            for place, experts in enumerate(logits[:-1].topk(2).indices.tolist()):
                for expert in experts:
                    taken[layer, expert] += 1
                    lost[layer, expert] += row[place].item()
    assert [use.layer for use in found.experts] == [0, 1, 2]
    for layer, use in enumerate(found.experts):
        assert use.shares == pytest.approx((taken[layer] / taken[layer].sum()).tolist())
        expected = [
            math.exp(nats / count) if count else None
            for nats, count in zip(lost[layer], taken[layer], strict=True)
        ]
        assert [value is None for value in use.perplexity] == [v is None for v in expected]
        assert [v for v in use.perplexity if v] == pytest.approx([v for v in expected if v], 1e-4)


def test_a_text_is_read_as_a_stream(tmp_path: Path) -> None:
    save_mixtral(tmp_path / "model")
    tokenizer = Tokenizer.load(str(tmp_path / "model"))
    path = tmp_path / "long.txt"
    path.write_text(text_of(3, 40), encoding="utf-8")
    read: list[str] = []

    def parts(block_chars: int) -> Iterator[list[int]]:
        for block in read_blocks(path, block_chars):
            read.append(block)
            yield tokenizer.encode(block, add_special_tokens=False)

    sequences = Sequences(tokenizer, 320, LENGTH)
    first, *others = sequences.cut(parts(10_000), str(path))
    [text] = read
    read.clear()
    stream = sequences.cut(parts(50), str(path))
    assert next(stream) == first
    assert sum(map(len, read)) < len(text) / 2
    assert [*stream] == others
    assert "".join(read) == text


def test_a_sequence_begins_as_its_tokenizer_says_and_has_a_token_of_the_text(
    tmp_path: Path,
) -> None:
    tokenizer = Tokenizer.load(str(TINY))
    assert beginning(tokenizer) == [0]
    assert list(Sequences(tokenizer, 320, 2).cut([[5], [6]], "text")) == [[0, 5], [0, 6]]
    with pytest.raises(ConfigError, match="a sequence of 1 tokens has no place beside the 1"):
        Sequences(tokenizer, 320, 1)
    save_mixtral(tmp_path)
    assert beginning(Tokenizer.load(str(tmp_path))) == [], "none is made up"


def test_blocks_are_the_text_with_its_own_line_ends_or_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("one\r\ntwo\u2028three\rfour\n\nfive".encode())
    assert list(read_blocks(path, 4)) == ["one\n", "two\u2028", "three\n", "four\n", "\nfive"]
    as_it_is = list(read_blocks(path, 4, ""))
    assert "".join(as_it_is) == path.read_bytes().decode()
    assert as_it_is[0] == "one\r\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_has_transformers_perplexity_and_greedy_tokens(
    tmp_path: Path, paths: list[Path], family: str
) -> None:
    folder = tmp_path / "model"
    model = FAMILIES[family](folder)
    found = evaluated(folder, paths)
    nats = []
    for path in paths:
        nats.append(nats_of(model, sequences_of(folder, path)))
        figures = found.texts[path.name]
        assert (figures.sequences, figures.tokens) == (len(nats[-1]), nats[-1].numel())
        assert figures.nats == pytest.approx(nats[-1].sum().item(), rel=1e-5)
        assert figures.perplexity == pytest.approx(math.exp(nats[-1].mean().item()), rel=1e-5)
        assert figures.exact
    assert found.all_texts is not None
    of_all = math.exp(torch.cat(nats).mean().item())
    assert found.all_texts.perplexity == pytest.approx(of_all, rel=1e-5)
    ours = FolderModel(open_checkpoint(folder), 40)
    for prompt in ([7, 3, 11, 200], [5]):  # one after another: each frees its pages
        tokens, at_s = ours.greedy(prompt, 12)
        assert len(at_s) == 12
        assert tuple(tokens) == transformers_tokens(model, prompt, 12)
