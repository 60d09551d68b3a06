"""``expertmesh evaluate``: its output, and one line for each kind of wrong input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from router.cli.app import app
from tests.checkpoints import save_mixtral, save_tokenizer
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc

TEXT = "the quick brown fox jumps over the lazy dog and then the other things there\n" * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model"
    save_mixtral(path)
    (path.parent / "held.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    cluster = LocalCluster(folder, identity="one")
    with serve_grpc(LocalGateway(folder, cluster)) as address:
        yield address
    cluster.close()


def run(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", str(folder), *words])


def refused(result: Result, code: int) -> str:
    """Check that an error is one line; returns it."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    [line] = result.stderr.splitlines()
    return line


def files(folder: Path) -> list[str]:
    return ["--text", f"{folder.parent}/held.txt"]


def test_it_prints_tables(folder: Path) -> None:
    result = run(folder, *files(folder), "--experts")
    assert result.exit_code == 0, result.output
    for part in ("held.txt", "perplexity", "layer", "expert"):
        assert part in result.stdout


def test_json_has_every_figure_and_a_server_gives_the_same(folder: Path, address: str) -> None:
    own = json.loads(run(folder, *files(folder), "--json").stdout)
    assert own["sequence_length"] == 256  # the model's context
    text = own["texts"]["held.txt"]
    assert len(text["experts"]) == 3
    assert sum(text["experts"][0]["shares"]) == pytest.approx(1)
    result = run(folder, *files(folder), "--json", "--served", "--address", address)
    served = json.loads(result.stdout)
    assert served["texts"]["held.txt"]["perplexity"] == pytest.approx(text["perplexity"])
    assert served["model"] == "m"
    told = run(folder, *files(folder), "--experts", "--served", "--address", address)
    assert "only a folder's own model tells the experts" in told.stdout


BAD_FILES = [
    (b"", "the text is empty"),
    (b"the quick", "fewer than the 256 of a sequence"),
    (b"\xff\xfe\xfa" * 100, "cannot be read as UTF-8"),
]


@pytest.mark.parametrize(("content", "says"), BAD_FILES)
def test_a_wrong_file_is_one_line(folder: Path, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "wrong"
    path.write_bytes(content)
    line = refused(run(folder, "--text", str(path)), 2)
    assert str(path) in line
    assert says in line


def test_wrong_options_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert "at least one --text" in refused(run(folder), 2)
    held = files(folder)
    for length in ("0", "1", "257"):
        line = refused(run(folder, *held, "--sequence-length", length), 2)
        assert "--sequence-length" in line
        assert "from 2 to 256" in line
    assert "another file has it too" in refused(run(folder, *held, *held), 2)
    assert "cannot be read" in refused(run(folder, "--text", str(tmp_path / "none.txt")), 2)
    assert "is no folder" in refused(run(tmp_path / "none", *held), 2)
    digits = Path(__file__).parents[4] / "deploy" / "models" / "digits"
    assert "is a mixture, not a language model" in refused(run(digits, *held), 2)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["Bert"]}')
    assert "bert" in refused(run(tmp_path, *held), 2)


def test_a_tokenizer_that_does_not_fit_is_one_line(
    folder: Path, tmp_path: Path, address: str
) -> None:
    own = tmp_path / "own"
    save_mixtral(own, vocab_size=300)  # its tokenizer has 320
    held = files(folder)
    assert "the tokenizer does not fit: it gives the id" in refused(run(own, *held), 2)
    other = tmp_path / "other"
    other.mkdir()
    save_tokenizer(other, 290)
    (other / "config.json").write_text((folder / "config.json").read_text())
    line = refused(run(other, *held, "--served", "--address", address), 2)
    assert "the tokenizer does not fit: m makes other tokens of a text" in line


def test_what_a_server_says_is_one_line(folder: Path, address: str) -> None:
    held = files(folder)
    served = [*held, "--served", "--address"]
    assert "is not served here" in refused(run(folder, *served, address, "--model", "none"), 1)
    assert "no ExpertMesh server answers" in refused(run(folder, *served, "127.0.0.1:1"), 3)
