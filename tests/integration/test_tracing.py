"""A trace of one request, through all processes that it went through."""

from __future__ import annotations

import secrets
from collections import Counter

import grpc
import httpx
import pytest

from router.protos import inference_pb2, inference_pb2_grpc
from tests.cluster_fixture import LAYERS, RANDOM, ServedCluster, prompt_of, wait_until
from tests.span_keeper import FiledSpan, read_spans

COUNT = 3
KEY = "em-canary-of-the-traces"
"""Shown with each request; the deployment asks for none."""


def generate(served: ServedCluster, on: str, prompt: list[int], traceparent: str) -> None:
    """Generate some tokens as a client does that traces."""
    if on == "http":
        body = {"model": RANDOM, "prompt": prompt, "max_tokens": COUNT, "ignore_eos": True}
        headers = {"traceparent": traceparent, "authorization": f"Bearer {KEY}"}
        url = f"{served.http_url}/v1/completions"
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        return
    request = inference_pb2.GenerateRequest(
        model=RANDOM,
        prompt_token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.Sampling(max_tokens=COUNT, ignore_eos=True),
    )
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        metadata = [("traceparent", traceparent), ("authorization", f"Bearer {KEY}")]
        reply = stub.Generate(request, timeout=30, metadata=metadata)
        assert len(reply.token_ids) == COUNT


@pytest.mark.parametrize("on", ["http", "grpc"])
def test_one_trace_leads_from_the_clients_span_to_the_expert_actors(
    served: ServedCluster, on: str
) -> None:
    trace_id, clients, other = secrets.token_hex(16), secrets.token_hex(8), secrets.token_hex(16)
    prompt = prompt_of(7, 3)
    generate(served, on, prompt, f"00-{other}-{clients}-00")  # its client does not want it traced
    generate(served, on, prompt, f"00-{trace_id}-{clients}-01")

    def told() -> dict[str, FiledSpan] | None:
        spans = {s.span_id: s for s in read_spans(served.spans_folder) if s.trace_id == trace_id}
        parents = {span.parent_id or "" for span in spans.values()}
        # Each process writes its own spans, in no order among them.
        return spans if parents - spans.keys() == {clients} else None

    spans = wait_until(told, "the trace is whole", 30)
    assert all(span.trace_id != other for span in read_spans(served.spans_folder))
    kept = [file.read_text() for file in served.spans_folder.iterdir()]
    assert any(trace_id in text for text in kept)
    assert not any(KEY in text for text in kept)
    names = Counter(span.name for span in spans.values())
    assert names["expertmesh.request"] == 1
    assert [names[f"expertmesh.{name}"] for name in ("queue", "prefill", "decode")] == [1] * 3
    assert names["expertmesh.step"] == COUNT
    assert names["expertmesh.layer"] == COUNT * LAYERS[RANDOM]
    assert names["expertmesh.experts"] >= names["expertmesh.layer"]

    pids = served.pids()
    for span in spans.values():
        if span.name == "expertmesh.experts":
            path = [span]
            while path[-1].parent_id in spans:
                path.append(spans[path[-1].parent_id or ""])
            assert path[-1].parent_id == clients
            ours = [s.name for s in path if s.name.startswith("expertmesh.")]
            kinds = ("experts", "layer", "step", "request")
            assert ours == [f"expertmesh.{kind}" for kind in kinds]
            assert span.pid in pids["actors"]
            assert path[1].pid in pids["routers"]
            assert path[-1].pid in pids["gateways"]
    [request] = [span for span in spans.values() if span.name == "expertmesh.request"]
    assert request.attributes["gen_ai.request.model"] == RANDOM
    assert request.attributes["gen_ai.usage.input_tokens"] == len(prompt)
    assert request.attributes["gen_ai.usage.output_tokens"] == COUNT
