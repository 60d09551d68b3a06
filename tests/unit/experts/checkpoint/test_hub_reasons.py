"""Why a model of the hub was not fetched, by the hub's own client against a hub of this test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CONFIG = json.dumps(
    {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 64,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "max_position_embeddings": 128, "torch_dtype": "bfloat16",
    }
).encode()  # fmt: skip
FILES = {
    "config.json": CONFIG,
    "model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
}
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers for one model without its weights, one that is gated, and no other."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, name = self.path.partition(f"/resolve/{COMMIT}/")
        if "acme/gated" in path:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "acme/small" not in path:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/other" in path:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif name in FILES:
            marks = {"ETag": f'"{len(FILES[name])}"', "X-Repo-Commit": COMMIT}
            self._answer(200, FILES[name], marks)
        elif "/tree/" in path:
            names = [*FILES, "1.safetensors", "2.safetensors"]
            files = [
                {"type": "file", "path": n, "size": len(FILES.get(n, b"")), "oid": "0" * 40}
                for n in names
            ]
            self._answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
        else:
            files = [{"rfilename": n} for n in (*FILES, "1.safetensors", "2.safetensors")]
            told = {"id": "acme/small", "sha": COMMIT, "siblings": files}
            self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in (*headers.items(), ("Content-Length", str(len(body)))):
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def check(model: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run ``expertmesh check MODEL`` against a hub; its client reads variables at its import."""
    program = "import sys; from router.cli.main import main; sys.argv[0] = 'expertmesh'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "check", model],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("acme/gated", "it is gated: accept its terms on the hub and set HF_TOKEN"),
        ("acme/none", "there is no such model, or it is private"),
        ("acme/small@other", "the model has no such revision"),
    ],
)
def test_a_refusal_of_the_hub_is_told_apart(
    model: str, reason: str, hub: str, tmp_path: Path
) -> None:
    done = check(model, hub, tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"expertmesh: {model}: ")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_does_not_answer_is_no_network(tmp_path: Path) -> None:
    done = check("acme/small", "http://127.0.0.1:9", tmp_path)
    assert "no network: the hub does not answer" in done.stderr


def test_a_model_is_described_without_its_weights(hub: str, tmp_path: Path) -> None:
    done = check("acme/small", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "acme/small: " in done.stdout
    assert "2 layers of 4 experts (top 2), bfloat16; 2 files of weights" in done.stdout
    assert not list(tmp_path.rglob("*.safetensors"))
