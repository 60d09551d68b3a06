"""The pure parts of the benchmark of scaling, and the checkpoint that it steers by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
import torch
from transformers import MixtralForCausalLM

from benchmarks import scaling, steered
from benchmarks.device_lines import picture
from benchmarks.devices import Product
from cluster.placement.placement import assign_experts
from cluster.spec import ModelExperts

SVG = "{http://www.w3.org/2000/svg}"
TRAFFICS = get_args(steered.Traffic)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MixtralForCausalLM:
    folder = tmp_path_factory.mktemp("steered")
    steered.save(folder)
    return MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize(
    "first", [*(steered.first_token(traffic, 5) for traffic in TRAFFICS), steered.zipf_token(40)]
)
def test_transformers_sends_steered_tokens_to_the_experts_that_are_meant(
    model: MixtralForCausalLM, first: int
) -> None:
    tokens = [first]
    for _ in range(steered.CYCLE):
        tokens.append(steered.next_token(tokens[-1]))
    output = model(torch.tensor([tokens]), output_router_logits=True)
    for layer, logits in enumerate(output.router_logits):
        assert logits.argmax(dim=1).tolist() == [steered.expert_of(layer, t) for t in tokens]
    said = output.logits[0].argmax(dim=1).tolist()
    assert said[:-1] == tokens[1:]


def test_every_token_belongs_to_one_stream() -> None:
    seen: list[int] = []
    for traffic in TRAFFICS:
        for stream in range(steered.STREAMS):
            token = steered.first_token(traffic, stream)
            for _ in range(steered.CYCLE if traffic == "spread" else 1):
                assert steered.stream_of(token) == stream
                seen.append(token)
                token = steered.next_token(token)
            assert token == steered.first_token(traffic, stream)
    assert sorted(seen) == list(range(1, steered.ZIPF_BEGIN))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_streams_with_experts_of_their_own_load_all_devices_alike(devices: int) -> None:
    experts = ModelExperts("m", tuple(range(steered.LAYERS)), steered.EXPERTS, 1)
    shares = assign_experts([experts], [f"a{i}" for i in range(devices)])
    device_of = {(key.layer_id, key.expert_id): a for a, keys in shares.items() for key in keys}

    def used(traffic: steered.Traffic) -> list[set[str]]:
        return [
            {
                device_of[layer, steered.expert_of(layer, steered.first_token(traffic, stream))]
                for layer in range(steered.LAYERS)
            }
            for stream in range(steered.STREAMS)
        ]

    own = [next(iter(one)) for one in used("own")]
    assert all(len(one) == 1 for one in used("own"))
    assert {own.count(actor_id) for actor_id in shares} == {steered.STREAMS // devices}
    assert len(set().union(*used("one"))) == 1


def test_a_rate_is_of_the_tokens_between_the_first_and_the_last_piece() -> None:
    arrivals = [(0.5, 9), (1.0, 1), (2.0, 2), (3.0, 2), (9.0, 9)]
    assert scaling.rate(arrivals, 0.9, 5.0) == pytest.approx(4 / 2)
    assert scaling.rate(arrivals, 8.0, 10.0) == 0.0
    assert scaling.rate([], 0.0, 1.0) == 0.0


def product(start_s: float, end_s: float, tokens: Sequence[int] = (1,)) -> Product:
    return Product(0, 0, tuple(tokens), start_s, end_s)


def test_the_busy_share_is_cut_at_the_ends() -> None:
    products = [product(0.0, 1.5), product(2.0, 2.5), product(4.8, 7.0)]
    assert scaling.busy_share(products, 1.0, 5.0) == pytest.approx((0.5 + 0.5 + 0.2) / 4)
    assert scaling.busy_share([], 1.0, 5.0) == 0.0


def result_of(devices: Sequence[int] = (1, 8)) -> dict[str, Any]:
    def measured(count: int) -> dict[str, Any]:
        lines = scaling.lines({f"e-{i}": [product(1.9, 2.4, (1, 2))] for i in range(count)}, 2, 3)
        return {
            "tokens_per_s": 10.0 * count,
            "busy": dict.fromkeys(lines, 0.5),
            "rows_per_product": 2.0,
            "cores_used": 0.1,
            "lines": lines,
        }

    traffic = {kind: {str(count): measured(count) for count in devices} for kind in TRAFFICS}
    return {"streams": 16, "traffic": traffic, "gain": scaling.gains(traffic)}


def test_gains_are_over_the_fewest_devices() -> None:
    assert result_of((2, 4, 8))["gain"]["own"] == {"2": 1.0, "4": 2.0, "8": 4.0}


def test_the_picture_of_the_devices_has_a_lane_each_and_a_stripe_per_row() -> None:
    root = ElementTree.fromstring(picture(json.loads(json.dumps(result_of()))))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert [text for text in texts if text.startswith("e-")] == [f"e-{i}" for i in range(8)] * 3
    stripes = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    assert len(stripes) == 3 * 8 * 2
    assert {stripe.attrib["height"] for stripe in stripes} == {"9.0"}
    assert len({stripe.attrib["fill"] for stripe in stripes}) == 2
    width = float(root.attrib["width"])
    for stripe in stripes:
        left = float(stripe.attrib["x"])
        assert 90 <= left < left + float(stripe.attrib["width"]) <= width
    assert "each request its own expert: 8.00 with 8" in texts
