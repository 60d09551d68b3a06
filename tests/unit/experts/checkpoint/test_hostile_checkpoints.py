"""Checkpoints made to do harm: no code is run, no other file is read, and memory stays small."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError, InvalidRequestError
from experts.checkpoint import small_files
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.remote.remote_reader import CheckpointReader
from experts.checkpoint.shards import INDEX_FILE, WEIGHTS_FILE
from router.gateway.input.tokenizer import Tokenizer
from router.model.model import load_dense
from tests.unit.bomb import EXECUTED, pickled_bomb
from tests.unit.gateway_fakes import tokenizer

PEAK = """
import resource, sys
from pathlib import Path
from cluster.errors import CheckpointError
from experts.checkpoint.shards import read_header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(read_header(Path(sys.argv[1]))))
except CheckpointError as error:
    print(error.message)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_of(file: Path) -> tuple[str, int]:
    """Return what a process of its own says of a header, and the bytes that it took for it."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, timeout=300
    )
    said, kilobytes = done.stdout.splitlines()
    return said, 1024 * int(kilobytes)


def test_a_header_takes_memory_in_proportion_and_none_if_it_is_too_long(tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    count, entry = 60_000, '"%x":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
    entries = ",".join(entry % (i, 4 * i, 4 * i + 4) for i in range(count))
    header = f"{{{entries}}}".encode()
    assert 3_000_000 < len(header) < 16 << 20
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * count))
    said, num_bytes = peak_of(file)
    assert int(said) == count
    assert num_bytes < 20 * len(header)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 99_999_990) + b'{"a":{"dtype":"F32",')
        opened.truncate(300_000_000)  # sparse: takes no room on disk
    said, num_bytes = peak_of(file)
    assert "its header has 99999990 bytes; at most 16777216" in said
    assert num_bytes < 4 << 20


def test_files_beside_the_weights_are_bounded_together_where_another_node_asks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader(str(folder))
    assert "tokenizer.json" in reader.open()["small_files"]
    for number in range(3):
        with (folder / f"{number}.json").open("wb") as file:
            file.truncate(50_000_000)  # sparse
    monkeypatch.setattr(small_files, "MAX_SMALL_FILES_BYTES", 100_000_000)
    error = reader.open()["error"]
    assert error["field"] == str(folder)
    assert "beside the weights" in error["message"]
    assert "at most 100000000" in error["message"]


@pytest.mark.parametrize(
    "name", [None, "adapter_model.bin", "other.safetensors", "../other.safetensors"]
)
def test_pickles_and_other_weights_beside_the_right_ones_are_never_read(
    folder: Path, name: str | None
) -> None:
    """Whether the configuration names them or not; the right ones are those of the index."""
    right = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors, folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    others = {key: value * 0 for key, value in tensors.items()}
    for file in (WEIGHTS_FILE, "other.safetensors", "../other.safetensors"):
        save_file(others, folder / file)
    pickled = pickled_bomb()
    for file in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / file).write_bytes(pickled)
    config = json.loads((folder / "config.json").read_text())
    if name is not None:
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    loaded = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in right.items())
    assert EXECUTED == []


# Tokenizers and chat templates.


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"\xff\xfe\x00", b'{"version": "1.0"}', b"[" * 100_000),
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 99999999999999}}}',
        b'{"version": "1.0", "model": {"type": "Python", "code": "import os"}}',
    ],
)
def test_a_tokenizer_of_which_none_can_be_made_is_refused(folder: Path, text: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="tokenizer's files cannot be used") as caught:
        Tokenizer.load(str(folder))
    assert caught.value.field == str(folder)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700


def test_a_tokenizers_code_is_never_run(folder: Path) -> None:
    trace = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    for file, keys in (
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
    ):
        config = json.loads((folder / file).read_text()) | {"auto_map": keys}
        config |= {"tokenizer_class": "Evil"} if "AutoTokenizer" in keys else {}
        (folder / file).write_text(json.dumps(config))
    with suppress(CheckpointError):
        Tokenizer.load(str(folder))
    load_dense(open_checkpoint(folder), torch.float32)
    assert not trace.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{{ messages['x'].y.z }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(999999999) %}{{ i }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 'x' | attr('format') }}{{ cycler.__init__.__globals__ }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_refusal_of_the_messages(template: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer(template).template.prompt([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"
    assert "root:" not in caught.value.message
