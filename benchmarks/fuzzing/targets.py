"""All targets by name; each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fuzzing import callers, files, links, predictions, requests, wires
from benchmarks.fuzzing.target import Target

TARGETS: dict[str, Callable[[], Target]] = {
    "frame": wires.frame,
    "stranger": wires.stranger,
    "router": wires.router,
    "actor": wires.actor,
    "link": links.link,
    "call-link": links.call_link,
    "link-handshake": links.handshake,
    "header": files.header,
    "index": files.index,
    "config": files.config,
    "params": files.params,
    "gguf": files.gguf,
    "tokenizer": files.tokenizer,
    "http": requests.http,
    "protobuf": requests.protobuf,
    "infer": predictions.http,
    "infer-protobuf": predictions.protobuf,
    "status": requests.status,
    "headers": callers.http,
    "metadata": callers.metadata,
}
