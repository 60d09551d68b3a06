"""Merged models: copies merge without loss, all families are served, one may be a dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cluster.errors import CheckpointError
from experts.checkpoint.checkpoint import open_checkpoint
from router.cli.app import app
from tests.quantise import CASES, make
from tests.unit.workshop.folders.edits import State, change, copy_permuted, expert_of
from tests.unit.workshop.folders.families import (
    ALL,
    SIZES,
    check_served,
    logits_of,
    save,
    whole_model,
)
from workshop.folders.card import Record
from workshop.folders.making import make_folder, source_checkpoint
from workshop.folders.merge.command import Group, Merge, MergedExperts, Merging, merging_of
from workshop.folders.merge.dense import DENSE_CLASSES, WITHOUT_DENSE
from workshop.folders.merge.likeness import DOWN, grouped, in_order, neuron_orders
from workshop.folders.options import MergeOptions

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0))
EVEN_SUMS = ["mixtral", "qwen3_moe", "dbrx", "gpt_oss", "deepseek_v3"]
"""The families whose weights of a token's experts always have the same sum."""
WITH_ONE = [name for name in ALL if name != "deepseek_v3"]
"""The families whose gate can have a single expert."""


def merged(folder: Path, dest: Path, text: Path, experts: int, **options: Any) -> Record:
    chosen = MergeOptions(experts, **{"sequences": 4, "sequence_length": 32} | options)
    return make_folder(Merge(source_checkpoint(str(folder)), chosen), dest, [text])


def dense_logits(folder: Path) -> torch.Tensor:
    """Return the logits of a dense folder as transformers itself loads it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        return model.eval()(input_ids=ROWS, use_cache=False).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", EVEN_SUMS)
def test_experts_that_are_one_in_other_orders_merge_without_loss(
    name: str, letters: Path, tmp_path: Path
) -> None:
    save(name, tmp_path / "model")
    copy_permuted(tmp_path / "model", dict.fromkeys(range(1, 8), 0))
    before = logits_of(name, whole_model(tmp_path / "model"), ROWS)
    merged(tmp_path / "model", tmp_path / "four", letters, 4)
    assert_close(logits_of(name, whole_model(tmp_path / "four"), ROWS), before)
    if name in WITH_ONE:
        merged(tmp_path / "model", tmp_path / "one", letters, 1)
        assert_close(logits_of(name, whole_model(tmp_path / "one"), ROWS), before)
    elif name in DENSE_CLASSES:  # of the others, the dense model is compared with this one below
        merged(tmp_path / "model", tmp_path / "dense", letters, 1, dense=True)
        assert_close(dense_logits(tmp_path / "dense"), before)


@pytest.mark.parametrize("by", ["routing", "output"])
def test_copies_find_each_other_and_merge_without_loss(
    by: str, letters: Path, tmp_path: Path
) -> None:
    save("mixtral", tmp_path / "model", num_experts_per_tok=1)
    copy_permuted(tmp_path / "model", {4: 1, 5: 0, 6: 3, 7: 2})
    record = merged(tmp_path / "model", tmp_path / "out", letters, 4, by=by)
    pairs = [[0, 5], [1, 4], [2, 7], [3, 6]]
    assert all(groups == pairs for groups in record.facts["merged_experts"].values())
    before, after = (
        logits_of("mixtral", whole_model(tmp_path / folder), ROWS) for folder in ("model", "out")
    )
    assert_close(after, before)


@pytest.mark.parametrize("name", list(ALL))
def test_a_merged_model_is_served_and_a_dense_one_equals_it(
    name: str, letters: Path, tmp_path: Path
) -> None:
    save(name, tmp_path / "model")
    merged(tmp_path / "model", tmp_path / "four", letters, 4, by="routing")
    assert open_checkpoint(tmp_path / "four").shape.num_experts == 4
    check_served(name, tmp_path / "four")
    if name in WITH_ONE:
        one = merged(tmp_path / "model", tmp_path / "one", letters, 1, by="output")
        assert open_checkpoint(tmp_path / "one").shape.num_experts_per_tok == 1
        check_served(name, tmp_path / "one")
    if name in WITH_ONE and name in DENSE_CLASSES:
        dense = merged(tmp_path / "model", tmp_path / "dense", letters, 1, dense=True)
        expected = logits_of(name, whole_model(tmp_path / "one"), ROWS)
        assert_close(dense_logits(tmp_path / "dense"), expected)
        assert one.figures is not None
        assert dense.figures is not None
        assert dense.figures.perplexity_after == pytest.approx(
            one.figures.perplexity_after, rel=1e-5
        )


def test_a_quantised_model_becomes_dense(letters: Path, tmp_path: Path) -> None:
    made = make(CASES["deepseek_v3"], tmp_path, **SIZES["deepseek_v3"])
    merged(made.folder, tmp_path / "quantised", letters, 1, dense=True)
    merged(made.plain, tmp_path / "plain-dense", letters, 1, dense=True)
    assert_close(dense_logits(tmp_path / "quantised"), dense_logits(tmp_path / "plain-dense"))


def test_every_family_has_a_dense_class_or_a_reason() -> None:
    assert DENSE_CLASSES.keys() | WITHOUT_DENSE.keys() == ALL.keys()
    assert not DENSE_CLASSES.keys() & WITHOUT_DENSE.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_neurons_is_found(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((12, 5), (12, 5), (5, 12), (12,), (12,), (5,))
    parts = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    orders = [torch.randperm(12, generator=draw) for _ in range(5)]
    mixed = [[in_order(part, index, order) for index, part in enumerate(parts)] for order in orders]
    assert not torch.equal(mixed[0][2], parts[2])
    for expert, found in zip(mixed, neuron_orders(parts, mixed, at_once=2), strict=True):
        restored = [in_order(part, index, found) for index, part in enumerate(expert)]
        assert all(map(torch.equal, restored, parts))


def test_the_order_of_bfloat16_neurons_is_that_of_their_exact_products() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((64, 48), (64, 48), (48, 64))
    one, other = (
        [torch.randn(shape, generator=draw).bfloat16() for shape in shapes] for _ in range(2)
    )
    exact = sum(
        left.double() @ right.double().T
        for left, right in (
            (part, by) if index < 2 else (part.T, by.T)
            for index, (part, by) in enumerate(zip(one, other, strict=True))
        )
    )
    _, expected = linear_sum_assignment(exact, maximize=True)
    wide = one[0].double() / 3
    before = wide.float() @ wide.float().T
    [found] = neuron_orders(one, [other], at_once=1)
    assert found.tolist() == expected.tolist()
    assert torch.equal(wide.float() @ wide.float().T, before)


def test_an_expert_that_is_not_finite_is_refused(letters: Path, tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")

    def edit(state: State) -> None:
        for part in expert_of(checkpoint, state, 1, 3):
            part[0] = np.inf

    change(tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match="an expert of layer 1 has numbers that are not"):
        merged(tmp_path / "model", tmp_path / "out", letters, 2)
    assert not (tmp_path / "out").exists()


def test_groups_join_what_is_most_alike_within_the_gates_groups() -> None:
    likeness = np.eye(6)
    for one, other, value in ((0, 3, 0.9), (1, 2, 0.8), (2, 4, 0.7), (0, 1, 0.3)):
        likeness[one, other] = likeness[other, one] = value
    assert grouped(likeness, 4, 1) == [[0, 3], [1, 2], [4], [5]]
    assert grouped(likeness, 3, 1) == [[0, 3], [1, 2, 4], [5]]
    assert grouped(likeness, 4, 2) == [[0], [1, 2], [3, 4], [5]]


def test_shares_are_by_use_and_a_lone_expert_has_the_mean_weight(tmp_path: Path) -> None:
    seen = {
        "hits": np.array([3, 1, 0, 0, 0, 0, 0, 0]),
        "weights": np.array([1.5, 0.5, 0, 0, 0, 0, 0, 0]),
        "tokens": np.array(8),
        "likeness": np.ones((8, 8)),
    }
    for name, factor in (("olmoe", 0.25), ("mixtral", 1.0), ("deepseek_v2", 0.25 / 1.5)):
        save(name, tmp_path / name)
        merging = merging_of(open_checkpoint(tmp_path / name), {1: seen}, 1)
        assert merging.groups[1][0].shares == (0.75, 0.25, 0, 0, 0, 0, 0, 0)
        assert merging.groups[1][0].reference == 0
        assert merging.factors[1] == pytest.approx(factor)


def test_a_merged_expert_is_the_mean_by_shares_of_all_in_its_group(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    group = Group((1, 2, 5, 7), tuple(shares.tolist()))
    experts = MergedExperts(checkpoint, Merging({1: [group]}, {1: 2.0}))
    state = load_file(tmp_path / "model" / "model.safetensors")
    parts = zip(*(expert_of(checkpoint, state, 1, n) for n in group.expert_ids), strict=True)
    for index, members in enumerate(parts):
        neurons = 1 if index == DOWN else 0  # summed over, since their order is another
        expected = (2 if index == DOWN else 1) * shares @ np.stack(members).sum(1 + neurons)
        found = experts.matrix(1, 0, index).sum(neurons)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    rows = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    expected = shares @ rows[list(group.expert_ids)]
    np.testing.assert_allclose(experts.gate_rows(1, rows)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--experts", "4"), "--text: merging needs a calibration text"),
        (("--experts", "8"), "--experts: must be 1, or at least 3, the experts of a token, and"),
        (("--experts", "2"), "--experts: must be 1, or at least 3, the experts of a token, and"),
        (("--experts", "4", "--dense"), "--dense: a dense model has --experts 1 (given: 4)"),
        (("--experts", "1", "--dense"), "--dense: dbrx has no dense class"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    save("dbrx", tmp_path / "model")
    result = CliRunner().invoke(
        app, ["merge", str(tmp_path / "model"), str(tmp_path / "out"), *words]
    )
    assert result.exit_code == 2
    assert message in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_command_prints_what_it_made(letters: Path, tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    words = ["merge", str(tmp_path / "model"), str(tmp_path / "out"), "--experts", "1", "--dense"]
    words += ["--text", str(letters), "--sequences", "4", "--sequence-length", "16"]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "before" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert (
        "expertmesh merge model out --experts 1 --by output --dense"
        in (tmp_path / "out" / "README.md").read_text()
    )
