"""``expertmesh explain`` against a real gateway over a small model, and its numbers by hand."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from router.cli.app import app
from router.client import Client, ModelInfo, Sampling, Token
from tests.checkpoints import save_mixtral
from tests.local_cluster import LocalCluster
from tests.local_gateway import LocalGateway
from tests.unit.gateway_fakes import serve_grpc
from tests.unit.terminal import Terminal
from workshop.cli import explain
from workshop.cli.explained import ALL_KINDS, Explained, token_kind

PROMPT = "The quick brown fox, 12 jumps"
INFO = ModelInfo("m", "mixtral", 2, 4, 2, 100, 64, "float32", (1, 3))
TOKENS = [
    Token(number, text, number == 0)
    for number, text in enumerate(("<s>", "In", " the", "re", " 12", ",", "\n", " the"))
]
ROWS = np.array(
    [
        [[0, 1], [3, 2]], [[1, 0], [0, 3]], [[2, 3], [0, 1]], [[2, 1], [1, 0]],
        [[3, 2], [2, 0]], [[0, 3], [1, 3]], [[0, 1], [2, 3]], [[2, 3], [0, 255]],
    ],
    np.uint8,
)  # fmt: skip
EXPLAINED = Explained(INFO, TOKENS, ROWS, 6, True)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    save_mixtral(folder)
    cluster = LocalCluster(folder, identity="one")
    with serve_grpc(LocalGateway(folder, cluster)) as found:
        yield found
    cluster.close()


def run(address: str, *args: str) -> Result:
    return CliRunner().invoke(app, ["explain", PROMPT, "--address", address, *args])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (",", "punctuation"),
        (' "', "punctuation"),
        (" 1947", "numbers"),
        ("3rd", "numbers"),
        (" Moses", "capitals"),
        ("SQL", "capitals"),
        (" the", "words"),
        ("\nand", "words"),
        ("ing", "parts of words"),
        ("é", "parts of words"),
        ("\n\n", "line ends and spaces"),
        (" ", "line ends and spaces"),
        ("\ufffd", "punctuation"),
    ],
)
def test_kind_of_a_token(text: str, kind: str) -> None:
    assert token_kind(text) == kind


def test_shares_and_entropies_are_those_counted_by_hand() -> None:
    assert EXPLAINED.kinds == [
        "special tokens", "capitals", "words", "parts of words", "numbers", "punctuation",
        "line ends and spaces", "words",
    ]  # fmt: skip
    for place in range(2):
        pairs = [
            (kind, expert)
            for kind, row in zip(EXPLAINED.kinds, ROWS, strict=True)
            for expert in row[place].tolist()
            if expert < 4
        ]
        by_expert = Counter(expert for _, expert in pairs)
        shares = [by_expert[expert] / len(pairs) for expert in range(4)]
        assert EXPLAINED.shares[place] == pytest.approx(shares)
        entropy = -sum(share * math.log2(share) for share in shares if share)
        assert EXPLAINED.entropies_bits[place] == pytest.approx(entropy)
        joint, kinds = Counter(pairs), Counter(kind for kind, _ in pairs)
        information = sum(
            count / len(pairs) * math.log2(count * len(pairs) / (kinds[kind] * by_expert[expert]))
            for (kind, expert), count in joint.items()
        )
        assert EXPLAINED.information_bits[place] == pytest.approx(information)
        for number, kind in enumerate(ALL_KINDS):
            own = [joint[kind, expert] / kinds[kind] for expert in range(4)]
            assert EXPLAINED.kind_shares[place, number] == pytest.approx(own)
    assert EXPLAINED.first_experts(0) == ROWS[:, 0, 0].tolist()
    assert EXPLAINED.most_used(1, 2) == [0, 3]


def test_an_expert_that_was_left_out_counts_nowhere() -> None:
    rows = ROWS.copy()
    rows[3] = 255
    lacking = Explained(INFO, TOKENS, rows, 6, False)
    assert lacking.first_experts(0)[3] is None
    assert (lacking.counts[:, ALL_KINDS.index("parts of words")] == 0).all()
    assert "re[-]" in explain._numbered(lacking, 0).plain
    assert np.isfinite(lacking.information_bits).all()


def test_as_json_it_has_the_experts_that_the_server_tells(address: str) -> None:
    result = run(address, "--json", "--max-tokens", "3")
    told = json.loads(result.stdout)
    with Client(address) as client:
        ids = client.tokenize(PROMPT)
        asked = Sampling(max_tokens=3, temperature=0.0, return_routed_experts=True)
        [reply] = client.generate(PROMPT, asked)
    assert reply.routed_experts is not None
    assert [token["experts"] for token in told["tokens"]] == reply.routed_experts.tolist()
    assert [token["id"] for token in told["tokens"]] == [*ids, *reply.token_ids[:-1]]
    assert (told["prompt_tokens"], told["exact"]) == (len(ids), True)
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]
    for layer in told["layers"]:
        assert sum(layer["shares"]) == pytest.approx(1, abs=1e-5)
        assert layer["kinds"].keys() == {token["kind"] for token in told["tokens"]}


def test_without_colours_tokens_have_the_numbers_of_their_experts(address: str) -> None:
    result = run(address, "--layer", "1")
    assert result.exit_code == 0
    rows = json.loads(run(address, "--json").stdout)["tokens"]
    text = "".join(f"{row['text']}[{row['experts'][1][0]}]" for row in rows)
    assert text in result.stdout.replace("\n", "")
    assert "\x1b" not in result.stdout
    for kind in {row["kind"] for row in rows}:
        assert f"{kind} " in result.stdout


def test_a_terminal_has_colours_and_a_legend_unless_it_wants_none(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal("explain", PROMPT, "--address", address)
    terminal.wait_for("first experts in layer")
    terminal.wait_for("\x1b[")
    terminal.wait_for("experts: ")
    assert terminal.process.wait(20) == 0
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal("explain", PROMPT, "--address", address)
    plain.wait_for("fox[")
    assert plain.process.wait(20) == 0


def test_the_most_used_experts_have_a_colour_of_their_own() -> None:
    many = ModelInfo("m", "mixtral", 1, 64, 1, 100, 64, "float32", (0,))
    rows = np.repeat(np.arange(64, dtype=np.uint8), 2)[:, None, None]
    wide = Explained(many, [Token(5, "a", False)] * 128, rows, 128, True)
    shown = wide.most_used(0, len(explain.COLOURS))
    styles = {explain._style(expert, shown) for expert in range(64)}
    assert len(styles) == len(explain.COLOURS) + 1
    assert "others" in explain._legend(wide, 0).plain
    console = Console(width=200)
    with console.capture() as captured:
        console.print(explain._kinds_table(wide, 0))
    assert captured.get().splitlines()[1].count("┃") == 3 + explain.SHOWN_EXPERTS + 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(address: str, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"experts.{suffix}"
    result = run(address, "--picture", str(file), "--max-tokens", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    begin = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert file.read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--layer", "9"), "--layer: must be one of 0, 1, 2, the layers with experts; got 9"),
        (("--picture", "x.pdf"), "--picture: x.pdf: the suffix must be one of png, svg"),
        (("--picture", "/no/such/x.png"), "--picture: /no/such/x.png: the folder does not exist"),
        (("--picture", "x.png"), "expertmesh[plots]"),  # as matplotlib is not there
    ],
)
def test_wrong_options_end_it_with_a_line(
    address: str, options: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "plots" in told:
        monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = run(address, *options)
    assert result.exit_code == 2
    assert told in result.stderr
