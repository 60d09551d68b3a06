"""Commands that are killed, meet a full disk, or are given what cannot be: nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from router.cli.app import app
from tests.checkpoints import save_tokenizer
from tests.unit.workshop.folders.dense_models import save_dense
from tests.unit.workshop.folders.edits import write_letters
from tests.unit.workshop.folders.families import save
from workshop.convert.staging import ConvertFailedError, staging_folder
from workshop.folders.dense_model import opened_dense
from workshop.folders.making import make_folder, source_checkpoint
from workshop.folders.merge.command import Merge
from workshop.folders.options import MergeOptions, PruneOptions, UpcycleOptions
from workshop.folders.prune.command import Prune
from workshop.folders.upcycle.command import Upcycle

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = PruneOptions(4, sequences=6, sequence_length=32, max_shard_size=200_000)
MERGE_OPTIONS = MergeOptions(3, sequences=6, sequence_length=32, max_shard_size=200_000)
UPCYCLE_OPTIONS = UpcycleOptions(
    4, shared=2, sequences=6, sequence_length=32, max_shard_size=50_000
)
FITTED = "upcycle, fitted"
COMMANDS = ("prune", "merge", "upcycle", FITTED)
KILLS = [
    ("prune", "calibrating", 1),
    ("prune", "writing", 3),
    ("prune", "scoring the source", 2),
    ("prune", "scoring the new model", 1),
    ("merge", "calibrating", 2),
    ("merge", "writing", 40),
    ("upcycle", "reading", 5),
    ("upcycle", "calibrating", 1),
    ("upcycle", "writing", 30),
    ("upcycle", "scoring it with 2 experts", 1),
    (FITTED, "calibrating", 2),
]
"""The commands that are killed, the phase, and after how many of its reports."""


class Given(NamedTuple):
    """A source, a text and a dense source."""

    source: Path
    text: Path
    dense: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    place = tmp_path_factory.mktemp("given")
    save("mixtral", place / "model")
    save_dense("llama", place / "dense", num_hidden_layers=3)
    return Given(place / "model", write_letters(place / "letters.txt", 5_400), place / "dense")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(
    command: str, given: Given, dest: Path, on_progress: Any = lambda phase, done, total: None
) -> None:
    if command in ("upcycle", FITTED):
        options = UPCYCLE_OPTIONS if command == "upcycle" else replace(UPCYCLE_OPTIONS, active=2)
        with opened_dense(str(given.dense)) as model:
            make_folder(Upcycle(model, options), dest, [given.text], on_progress)
        return
    kind, options = (Prune, OPTIONS) if command == "prune" else (Merge, MERGE_OPTIONS)
    work = kind(source_checkpoint(str(given.source)), options)
    make_folder(work, dest, [given.text], on_progress)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for what each of :data:`KILLS` leaves, by its number."""
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def whole(
    given: Given, killed: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The files of runs that nothing ended, by command.

    While one runs, its folder is copied at each of :data:`KILLS`. The copy has the bytes that
    ``SIGKILL`` would leave: those that the process has handed to the system.
    """
    place = tmp_path_factory.mktemp("whole")

    def run_whole(command: str) -> dict[str, bytes]:
        seen: Counter[str] = Counter()

        def copy_at_kills(phase: str, done: int, total: int) -> None:
            seen[phase] += 1
            for number, kill in enumerate(KILLS):
                if kill == (command, phase, seen[phase] - 1):
                    shutil.copytree(place / command, killed / str(number))

        run(command, given, place / command / "out", copy_at_kills)
        return files_of(place / command / "out")

    return {command: run_whole(command) for command in COMMANDS}


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[f"{c}-{p}" for c, p, _ in KILLS])
def test_a_killed_command_goes_on_and_gives_the_same_bytes(
    given: Given, whole: dict[str, dict[str, bytes]], killed: Path, number: int
) -> None:
    command, dest = KILLS[number][0], killed / str(number) / "out"
    assert [file.name for file in dest.parent.iterdir()] == [staging_folder(dest).name]
    steps: list[str] = []
    run(command, given, dest, lambda now, done, total: steps.append(f"{now} {done}"))
    assert files_of(dest) == whole[command]
    assert [file.name for file in dest.parent.iterdir()] == ["out"]
    assert ("calibrating 0" in steps) is (KILLS[number][1] == "reading")


def test_a_changed_option_begins_anew(
    given: Given, whole: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    def break_off(phase: str, done: int, total: int) -> None:
        if phase == "scoring the source":
            raise KeyboardInterrupt

    command = Prune(source_checkpoint(str(given.source)), replace(OPTIONS, experts=5))
    with pytest.raises(KeyboardInterrupt):
        make_folder(command, tmp_path / "out", [given.text], break_off)
    run("prune", given, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole["prune"]


@pytest.mark.parametrize("phase", ["calibrating", "writing", "scoring the source"])
def test_a_disk_that_fills_leaves_nothing_at_the_destination(
    given: Given, whole: dict[str, dict[str, bytes]], tmp_path: Path, small_files: Any, phase: str
) -> None:
    def fill(now: str, done: int, total: int) -> None:
        if now == phase:
            small_files(1000)

    with pytest.raises(ConvertFailedError, match="cannot be written: File too large"):
        run("prune", given, tmp_path / "out", fill)
    assert [file.name for file in tmp_path.iterdir()] == [".out.converting"]
    small_files(resource.RLIM_INFINITY)
    run("prune", given, tmp_path / "out")
    assert files_of(tmp_path / "out") == whole["prune"]


def refused(tmp_path: Path, source: Path, *words: str, command: str = "prune") -> str:
    """Return the one line that a command is refused with; nothing must be written."""
    before = sorted(os.listdir(tmp_path))
    result = CliRunner().invoke(app, (command, str(source), str(tmp_path / "out"), *words))
    assert result.exit_code == 2, result.output
    assert sorted(os.listdir(tmp_path)) == before
    [line] = [line for line in result.stderr.splitlines() if line.strip() and "reading" not in line]
    return line


def test_what_cannot_be_is_refused_in_one_line(given: Given, tmp_path: Path) -> None:
    text, short = str(given.text), tmp_path / "short.txt"
    short.write_text("a line\n" * 5)
    four = ("--experts", "4", "--text")
    for words, message in (
        (("--experts", "0", "--text", text), "--experts: must be 1, or at least 2, the experts of"),
        (("--experts", "8", "--text", text), "fewer than the 8 of a layer (given: 8)"),
        (("--experts", "4"), "--text: --by output needs a calibration text"),
        ((*four, str(short)), "too short to hold any of it out"),
        ((*four, str(tmp_path / "no.txt")), "no.txt: cannot be read"),
        ((*four, text, "--sequence-length", "300"), "--sequence-length: must be from 1 to 256 (gi"),
        ((*four, text, "--sequences", "0"), "--sequences: must be at least 1"),
    ):
        assert message in refused(tmp_path, given.source, *words)


@pytest.mark.parametrize(
    ("sizes", "words", "message"),
    [
        (
            {"max_position_embeddings": 100_000},
            ("4", "--sequence-length", "60000"),
            "tokens, fewer than the 60001 of a sequence; give more text",
        ),
        ({"vocab_size": 200}, ("4",), "the tokenizer does not fit: it gives the id"),
        (None, ("5", "--by", "random"), "must be a multiple of the gate's 2 groups"),
    ],
    ids=["few tokens", "another's tokenizer", "groups"],
)
def test_what_does_not_fit_the_model_is_refused(
    sizes: dict[str, int] | None, words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    save("deepseek_v3" if sizes is None else "mixtral", tmp_path / "model", **(sizes or {}))
    save_tokenizer(tmp_path / "model")
    text = write_letters(tmp_path / "letters.txt")
    options = ("--experts", *words, "--text", str(text))
    assert message in refused(tmp_path, tmp_path / "model", *options)


def test_no_tokenizer_unknown_families_and_full_destinations_are_refused(
    given: Given, tmp_path: Path
) -> None:
    words = ("--experts", "4", "--text", str(given.text))
    bare, other = (shutil.copytree(given.source, tmp_path / name) for name in ("bare", "other"))
    for file in bare.glob("token*"):
        file.unlink()
    assert "has no tokenizer, so no text can be read" in refused(tmp_path, bare, *words)
    change_config(other, {"model_type": "llama"})
    assert "model_type" in refused(tmp_path, other, *words)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "DEST must be new or empty" in refused(tmp_path, given.source, *words)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_upcycled_is_refused_in_one_line(given: Given, tmp_path: Path) -> None:
    text = ("--text", str(given.text))
    for words, message in (
        (("--experts", "1", *text), "--experts: must be at least 2 (given: 1)"),
        (("--experts", "4", "--active", "5", *text), "--active: must be from 1 to the 4 experts"),
        (("--experts", "4", "--shared", "0", *text), "--shared: must be at least 1, since Qwen2"),
        (("--experts", "6", *text), "6 experts and 1 shared parts do not divide the 48 neurons"),
        (("--experts", "5"), "--text: --by split needs a calibration text"),
    ):
        assert message in refused(tmp_path, given.dense, *words, command="upcycle")
    line = refused(tmp_path, given.source, "--experts", "5", *text, command="upcycle")
    assert "model_type 'mixtral' cannot be upcycled; supported: llama, mistral, qwen2" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "'qwen3' cannot be upcycled (Qwen2-MoE has no norms of"),
        ({"architectures": ["LlamaForTokenClassification"]}, "unknown architectures"),
        ({"attention_bias": True}, "attention_bias cannot be upcycled"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config cannot be"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not"),
        ({"hidden_act": "tanh"}, "unknown hidden_act 'tanh'"),
        ({"num_hidden_layers": 4}, "lacks tensors: model.layers.3."),
        ({"intermediate_size": 96}, "has shape [48, 32]; config.json says [96, 32]"),
        ({"intermediate_size": None}, "lacks a positive intermediate_size"),
    ],
)
def test_a_wrong_dense_model_is_refused_in_one_line(
    given: Given, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    dense = shutil.copytree(given.dense, tmp_path / "dense")
    change_config(dense, changes)
    words = ("--experts", "5", "--text", str(given.text))
    assert message in refused(tmp_path, dense, *words, command="upcycle")
