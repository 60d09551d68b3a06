"""The benchmarks' pure parts: summaries, comparing two runs, and what a trace becomes."""

from __future__ import annotations

import argparse
import json
import mmap
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.common import (
    Figure,
    compare,
    figures_from_json,
    figures_to_json,
    finish,
    mapped_mb,
    output_options,
    percentile,
    summary_ms,
)
from benchmarks.serve import summarize
from benchmarks.serve_clients import Timed
from benchmarks.timeline import Span, chrome_trace, clip, svg, typical_window

SVG = "{http://www.w3.org/2000/svg}"


def step(start_s: float, layer_s: float, layers: int = 4) -> list[Span]:
    """Return a step whose layers are a quarter each of dense, send, wait and combine."""
    spans = []
    for layer in range(layers):
        begin, part = start_s + layer * layer_s, layer_s / 4
        for place, name in enumerate(("dense", "send", "wait", "combine")):
            at = begin + place * part
            spans.append(Span("router", name, at, at + part))
        spans.append(Span("router", "layer", begin + part, begin + layer_s))
        at = begin + 2 * part
        spans.append(Span("actor-0", "idle", begin, at))
        spans.append(Span("actor-0", "answer", at, at + part * 0.8))
        spans.append(Span("actor-0", "products", at + part * 0.1, at + part * 0.7))
        spans.append(Span("actor-0", "send", at + part * 0.8, at + part))
    return [*spans, Span("router", "step", start_s, start_s + layers * layer_s)]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 51), (0.99, 100), (1.0, 100)])
def test_percentile(share: float, expected: int) -> None:
    assert percentile([float(i) for i in range(100, 0, -1)], share) == expected


def test_summary_is_in_milliseconds() -> None:
    assert summary_ms([0.001, 0.002, 0.009]) == {"p50_ms": 2.0, "p99_ms": 9.0, "count": 3}


@pytest.mark.parametrize(
    ("better", "old", "new", "verdict"),
    [
        ("higher", 100.0, 86.0, "slower"),
        ("higher", 100.0, 88.0, "same"),
        ("higher", 100.0, 114.0, "same"),
        ("higher", 100.0, 116.0, "faster"),
        ("lower", 1.0, 1.16, "slower"),
        ("lower", 1.0, 1.14, "same"),
        ("lower", 1.0, 0.88, "same"),
        ("lower", 1.0, 0.86, "faster"),
        ("context", 100.0, 10.0, "context"),
        ("lower", 0.0, 0.0, "same"),
        ("lower", 0.0, 1.0, "slower"),
        ("higher", 1.0, 0.0, "slower"),
    ],
)
def test_a_figure_gets_slower_in_its_own_direction(
    better: str, old: float, new: float, verdict: str
) -> None:
    [compared] = compare({"f": Figure(old, better)}, {"f": Figure(new, better)})  # type: ignore[arg-type]
    assert (compared.verdict, compared.old, compared.new) == (verdict, old, new)
    if old and new:
        assert compared.ratio == pytest.approx(new / old)


def test_figures_of_one_run_only_are_neither_slower_nor_faster() -> None:
    compared = compare({"gone": Figure(1.0, "lower")}, {"added": Figure(2.0, "lower")})
    assert [(c.name, c.old, c.new, c.ratio, c.verdict) for c in compared] == [
        ("added", None, 2.0, None, "new"),
        ("gone", 1.0, None, None, "missing"),
    ]


def test_figures_survive_their_json() -> None:
    figures = {"a": Figure(1.5, "lower"), "b": Figure(2.0, "context")}
    wire = json.loads(json.dumps({"compare": figures_to_json(figures)}))
    assert figures_from_json(wire) == figures
    assert figures_from_json({}) == {}


@pytest.mark.parametrize(("new_ms", "status"), [(1.1, 0), (1.2, 1), (0.5, 0)])
def test_the_exit_status_tells_of_a_slower_figure(
    tmp_path: Path, new_ms: float, status: int
) -> None:
    parser = argparse.ArgumentParser()
    output_options(parser)
    file = tmp_path / "run.json"
    result = {"benchmark": "x", "machine": {"cpus": 2}}
    assert (
        finish(result, {"t": Figure(1.0, "lower")}, parser.parse_args(["--json", str(file)])) == 0
    )
    # The same file for both: the old run is read before the new one is written.
    options = parser.parse_args(["--compare", str(file), "--json", str(file)])
    assert finish(result, {"t": Figure(new_ms, "lower")}, options) == status
    assert json.loads(file.read_text())["compare"]["t"]["value"] == new_ms


def test_an_unreadable_old_run_is_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    output_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--compare", str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err


def test_a_round_is_timed_from_its_first_request_to_its_last_answer() -> None:
    slow = Timed(10.0, [(10.5, 1), (10.7, 1), (11.0, 2)], 11.0)
    quick = Timed(10.1, [(10.2, 4)], 10.2)
    result = summarize([[slow, quick]], stream=True)
    assert result["tokens_per_s"] == pytest.approx(8.0)
    assert result["request"]["p99_ms"] == pytest.approx(1000.0)
    assert result["first_token"]["p99_ms"] == pytest.approx(500.0)
    assert result["between_tokens"] == {"p50_ms": 250.0, "p99_ms": 300.0, "count": 2}
    assert "first_token" not in summarize([[slow, quick]], stream=False)


def test_the_chrome_trace_has_names_and_microseconds() -> None:
    spans = [
        Span("router", "send", 5.0, 5.001),
        Span("actor-0", "products", 5.001, 5.003),
        Span("router", "layer", 5.0, 5.004),
    ]
    trace = json.loads(json.dumps(chrome_trace(spans)))
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["actor-0", "router"]
    assert {e["pid"] for e in events if e["name"] == "thread_name"} == set(names)
    drawn = [e for e in events if e["ph"] == "X"]
    # A span that holds another comes before it, as viewers nest them.
    assert [(names[e["pid"]], e["name"], e["ts"], e["dur"]) for e in drawn] == [
        ("router", "layer", 0.0, pytest.approx(4000.0)),
        ("router", "send", 0.0, pytest.approx(1000.0)),
        ("actor-0", "products", pytest.approx(1000.0), pytest.approx(2000.0)),
    ]


def test_a_trace_of_nothing_is_a_trace() -> None:
    assert chrome_trace([])["traceEvents"] == []


def test_clip_cuts_spans_at_the_window() -> None:
    spans = [Span("a", "x", 0.0, 1.0), Span("a", "y", 0.5, 3.0), Span("a", "z", 2.0, 3.0)]
    assert clip(spans, 0.6, 2.0) == [Span("a", "x", 0.6, 1.0), Span("a", "y", 0.6, 2.0)]


def test_the_window_has_layers_of_the_median_step() -> None:
    spans = [*step(0.0, 0.002), *step(1.0, 0.004), *step(2.0, 0.1)]
    assert typical_window(spans, layers=2) == pytest.approx((1.004, 1.012))
    assert typical_window(spans, layers=9) == pytest.approx((1.0, 1.016))


def test_a_window_needs_a_step_with_a_layer() -> None:
    with pytest.raises(ValueError, match="no step"):
        typical_window([])
    with pytest.raises(ValueError, match="no layer"):
        typical_window([Span("router", "step", 0.0, 1.0)])


def test_the_picture_has_a_lane_per_process_bars_an_axis_and_a_legend() -> None:
    spans = step(1.0, 0.004)
    start_s, end_s = typical_window(spans, layers=2)
    root = ElementTree.fromstring(svg(spans, start_s, end_s))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts.index("router") < texts.index("actor-0")
    assert {"0", "1", "8", "ms"} <= set(texts)
    assert ["dispatch 1" in texts, "dispatch 2" in texts, "dispatch 3" in texts] == [1, 1, 0]
    assert any(text.startswith("products (") for text in texts if text)
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(bars) == 2 * 8
    width = float(root.attrib["width"])
    assert all(0 < float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width for bar in bars)
    # Products lie on the answer that holds them, so they must come later in the file.
    fills = [bar.attrib["fill"] for bar in bars]
    assert fills.index("#edc948") < fills.index("#e15759")


def test_names_are_escaped_in_the_picture() -> None:
    text = svg([Span("<a&b>", "send", 0.0, 1.0)], 0.0, 1.0)
    assert "&lt;a&amp;b&gt;" in text
    ElementTree.fromstring(text)


@pytest.mark.parametrize("num_pages", [0, 1, 1000])
def test_only_pages_of_a_tensor_that_were_touched_are_resident(num_pages: int) -> None:
    tensor = torch.frombuffer(mmap.mmap(-1, 2000 * mmap.PAGESIZE), dtype=torch.uint8)
    tensor[: num_pages * mmap.PAGESIZE] = 1
    assert mapped_mb(tensor) == pytest.approx(num_pages * mmap.PAGESIZE / 1e6)
