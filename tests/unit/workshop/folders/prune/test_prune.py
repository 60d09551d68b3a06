"""Pruned models: what must not change does not, what matters stays, and all families are served."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from experts.checkpoint.checkpoint import open_checkpoint
from router.cli.app import app
from router.engine.batch import pack
from tests.local_cluster import LocalCluster, greedy_request
from tests.quantise import CASES, MIXTRAL, make
from tests.unit.workshop.folders.edits import gate_tensors, never_route
from tests.unit.workshop.folders.families import (
    ALL,
    SIZES,
    TRANSFORMERS,
    check_served,
    logits_of,
    save,
    whole_model,
)
from workshop.convert.plan import STORED, make_plan
from workshop.convert.write import open_source
from workshop.folders.card import Record
from workshop.folders.making import make_folder, source_checkpoint
from workshop.folders.options import Importance, PruneOptions
from workshop.folders.prune.command import Prune, importance, most_important

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[5]
NEVER = (1, 4)
KEPT = [0, 2, 3, 5, 6, 7]
ROWS = torch.randint(1, 300, (3, 24), generator=torch.Generator().manual_seed(0))


def pruned(folder: Path, dest: Path, texts: list[Path], **options: Any) -> Record:
    few = {"sequences": 8, "sequence_length": 32}
    return make_folder(
        Prune(source_checkpoint(str(folder)), PruneOptions(**few | options)), dest, texts
    )


@torch.inference_mode()
def engine_logits(folder: Path) -> torch.Tensor:
    """Return the product's logits after each of some prompts."""
    cluster, found = LocalCluster(folder, threaded=False), []
    for index, row in enumerate(ROWS.tolist()):
        cluster.scheduler.add(greedy_request(f"r{index}", tuple(row), 1))
        work = cluster.scheduler.schedule()
        found.append(cluster.forward(pack(work, cluster.model.attention)).clone())
        cluster.engine.step(work)
    cluster.close()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "by"), [*((name, "output") for name in ALL), ("mixtral", "weight")]
)
def test_without_experts_that_no_token_chose_the_logits_are_the_same_bits(
    name: str, by: Importance, letters: Path, tmp_path: Path
) -> None:
    save(name, tmp_path / "model")
    never_route(tmp_path / "model", NEVER)
    record = pruned(tmp_path / "model", tmp_path / "output", [letters], experts=6, by=by)
    assert all(kept == KEPT for kept in record.facts["kept_experts"].values())
    assert record.figures is not None
    assert record.figures.perplexity_before == record.figures.perplexity_after
    assert torch.equal(engine_logits(tmp_path / "model"), engine_logits(tmp_path / "output"))
    if name in TRANSFORMERS:
        before, after = (
            logits_of(name, whole_model(tmp_path / folder), ROWS) for folder in ("model", "output")
        )
        assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("name", list(ALL))
def test_a_pruned_model_has_the_kept_experts_bits_and_is_served(name: str, tmp_path: Path) -> None:
    save(name, tmp_path / "model")
    record = pruned(tmp_path / "model", tmp_path / "out", [], experts=4, by="random", seed=2)
    old, new = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "out")
    assert new.shape.num_experts == 4
    before, after = (load_file(c.folder / "model.safetensors") for c in (old, new))
    gates = gate_tensors(old)
    for layer, kept in record.facts["kept_experts"].items():
        assert kept == sorted(set(kept))
        names = [gate for gate in gates if f".{layer}." in gate]
        assert names
        assert all(torch.equal(after[gate], before[gate][kept]) for gate in names)
    dense = old.family.dense_tensors(old.config).keys() - set(gates)
    assert all(torch.equal(after[tensor], before[tensor]) for tensor in dense)
    check_served(name, tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", *CASES])
def test_a_quantised_model_is_pruned_to_plain_weights(name: str, tmp_path: Path) -> None:
    made = make(CASES.get(name, MIXTRAL), tmp_path, **SIZES.get(name, {}))
    pruned(made.folder, tmp_path / "out", [], experts=4, by="random")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    check_served(name, tmp_path / "out")


def test_importance_beats_random_at_equal_count(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(2 * (ROOT / "LICENSE").read_text())

    def perplexity(**options: Any) -> float:
        dest = tmp_path / "-".join(map(str, options.values()))
        few = {"experts": 4, "sequences": 24, "sequence_length": 64}
        record = make_folder(
            Prune(source_checkpoint("models/mesh-tiny"), PruneOptions(**few, **options)),
            dest,
            [text],
        )
        assert record.figures is not None
        assert record.figures.perplexity_before < record.figures.perplexity_after
        return record.figures.perplexity_after

    at_random = fmean(perplexity(by="random", seed=seed) for seed in (1, 2, 3))
    assert max(perplexity(by="weight"), perplexity(by="output")) < at_random


def test_a_model_of_one_expert_a_layer_is_served(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model")
    pruned(tmp_path / "model", tmp_path / "out", [], experts=1, by="random")
    assert open_checkpoint(tmp_path / "out").shape.num_experts_per_tok == 1
    check_served("mixtral", tmp_path / "out")


def test_importance_is_what_the_papers_say() -> None:
    seen = {
        "hits": torch.tensor([4, 0, 2]).numpy(),
        "weights": torch.tensor([2.0, 0.0, 1.8]).double().numpy(),
        "norms": torch.tensor([2.0, 0.0, 3.0]).double().numpy(),
        "tokens": torch.tensor(10).numpy(),
    }
    assert importance("weight", seen).tolist() == pytest.approx([0.2, 0.0, 0.18])
    assert importance("output", seen).tolist() == pytest.approx([0.5, 0.0, 1.5])
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 9.0, 8.0, 7.0, 6.0]).numpy()
    assert most_important(scores, 3, 1) == [4, 5, 6]
    assert most_important(scores, 4, 2) == [1, 2, 4, 5]


@pytest.mark.parametrize("name", list(ALL))
def test_a_plan_in_the_stored_dtypes_has_the_models_bytes(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    plan = make_plan(open_source(tmp_path), STORED, 10**9)
    assert plan.size_bytes == open_checkpoint(tmp_path).num_bytes


def test_the_command_prints_what_it_made_and_its_card_has_the_command(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("mixtral", tmp_path / "model")
    shutil.copy(letters, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["prune", "model", "out", "--experts", "4", "--text", "letters.txt"]
    words += ["--sequences", "4", "--sequence-length", "16"]
    dry = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    assert not Path("out").exists()
    done = CliRunner().invoke(app, [*words, "--json"])
    record = json.loads(done.stdout)
    assert json.loads(dry.stdout)["size_bytes"] == record["size_bytes"]
    assert record == json.loads(Path("out/workshop.json").read_text())
    card = Path("out/README.md").read_text()
    assert f"{record['figures']['perplexity_after']:.3f}" in card
    [command] = [line for line in card.splitlines() if line.startswith("expertmesh prune ")]
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    shutil.rmtree("out")
    assert CliRunner().invoke(app, shlex.split(command)[1:]).exit_code == 0
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before
