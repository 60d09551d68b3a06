"""The benchmark of hashes: a checkpoint of the asked size, all kinds of runs, nothing left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import identity
from benchmarks.identity import (
    CACHED,
    DISK,
    KEPT,
    PLAIN,
    READ,
    VERIFIED,
    bytes_of,
    config_of,
    main,
    make_checkpoint,
    verdicts_of,
)
from experts.checkpoint.checkpoint import open_checkpoint

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}


@pytest.mark.parametrize("gigabytes", [1.0, 10.0])
def test_a_checkpoint_has_about_the_asked_size(gigabytes: float) -> None:
    assert bytes_of(config_of(gigabytes)) / 1e9 == pytest.approx(gigabytes, rel=0.2)


def test_the_checkpoint_is_one_that_is_served(tmp_path: Path) -> None:
    config = config_of(0.001, **SMALL)
    make_checkpoint(tmp_path, config)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.num_bytes == bytes_of(config)
    assert len({info.file for info in checkpoint.tensors.values()}) > 1


def test_all_is_measured_written_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(identity, "CONFIG", {**identity.CONFIG, **SMALL})
    place, result = tmp_path / "place", tmp_path / "result.json"
    place.mkdir()
    main(["--gigabytes", "0.001", "--rounds", "1", "--folder", str(place), "--json", str(result)])
    assert list(place.iterdir()) == []
    measured = json.loads(result.read_text(encoding="utf-8"))
    shown = capsys.readouterr().out
    for kind in (READ, DISK, CACHED, KEPT, PLAIN, VERIFIED):
        assert measured[kind]["wall_s"] > 0
        assert kind in shown
    assert measured["sizes"]["num_bytes"] == measured[DISK]["num_bytes"]


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=500_000_000)
    monkeypatch.setattr(identity.shutil, "disk_usage", lambda path: full)
    assert main(["--gigabytes", "1", "--folder", str(tmp_path)]) == 2
    assert "fewer --gigabytes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_promises_are_judged_beside_what_the_disk_gives() -> None:
    def kept(read_s: float, disk_s: float, kept_s: float) -> list[bool]:
        seconds = {READ: read_s, DISK: disk_s, KEPT: kept_s}
        result = {
            kind: {"wall_s": wall_s, "cpu_s": 1.0, "num_bytes": 10**9}
            for kind, wall_s in seconds.items()
        }
        return [verdict.is_kept for verdict in verdicts_of(result)]

    assert kept(0.2, 0.9, 0.01) == [True, True]
    assert kept(0.2, 1.1, 0.2) == [False, False]
    assert kept(4.0, 4.2, 0.01) == [True, True]  # a slow disk
    assert kept(4.0, 5.0, 0.01) == [False, True]
