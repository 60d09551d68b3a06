"""Checkpoints made to do harm: a clear refusal, no code run, memory that stays small."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import CheckpointError, InvalidRequestError
from experts.checkpoint import shards, small_files
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.config import read_json
from experts.checkpoint.config_checks import MAX_DEPTH
from experts.checkpoint.remote.remote_reader import CheckpointReader
from experts.checkpoint.shards import INDEX_FILE, MAX_HEADER_BYTES, WEIGHTS_FILE, read_header
from router.gateway.input.tokenizer import Tokenizer
from router.model.model import load_dense
from tests.checkpoints import save_mixtral
from tests.unit.bomb import EXECUTED, pickled_bomb
from tests.unit.gateway_fakes import tokenizer
from workshop.convert.write import open_source


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_mixtral(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refused(action: Callable[[], object], file: str, *words: str) -> str:
    """Check that an action is refused, naming the file, on one short and printable line."""
    with pytest.raises(CheckpointError) as caught:
        action()
    assert caught.value.field.endswith(file), caught.value
    for word in words:
        assert word in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 700
    return caught.value.message


def header_of(count: int, max_bytes: int) -> tuple[bytes, int]:
    """Return a good header of so many tensors, or of as many as fit, and its data's bytes."""
    entries, left_bytes, number = [], max_bytes - 2, 0
    while number < count:
        place = f"[{4 * number},{4 * number + 4}]"
        entry = f'"{number:x}":{{"dtype":"F32","shape":[],"data_offsets":{place}}}'
        left_bytes -= len(entry) + 1
        if left_bytes < 0:
            break
        entries.append(entry)
        number += 1
    return ("{" + ",".join(entries) + "}").encode(), 4 * number


def write_shard(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


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
    """Return what a process of its own says of a header, and the kilobytes that it took for it."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, timeout=300
    )
    said, kilobytes = done.stdout.splitlines()
    return said, int(kilobytes)


def test_a_header_of_100_megabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 99_999_990) + b'{"a":{"dtype":"F32",')
        opened.truncate(300_000_000)  # sparse: takes no room on disk
    said, kilobytes = peak_of(file)
    assert "its header has 99999990 bytes; at most 16777216" in said
    assert kilobytes < 4096


def test_a_header_that_is_long_but_allowed_takes_memory_in_proportion(tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    header, data_bytes = header_of(1 << 20, 4 << 20)
    assert len(header) > 4_000_000
    write_shard(file, header, bytes(data_bytes))
    said, kilobytes = peak_of(file)
    assert int(said) == data_bytes // 4
    assert kilobytes * 1024 < 20 * len(header)


def test_headers_are_bounded_together_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / WEIGHTS_FILE).unlink()
    for name in "abc":
        header = b'{"%b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}' % name.encode()
        write_shard(folder / f"{name}.safetensors", header, bytes(4))
    index = {"weight_map": {name: f"{name}.safetensors" for name in "abc"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    monkeypatch.setattr(shards, "MAX_HEADERS_BYTES", 2 * len(header) + 10)
    for opened in (open_checkpoint, open_source):
        refused(lambda opened=opened: opened(folder), "c.safetensors", f"{len(header)} bytes; at")


def two(first: tuple[int, int], second: tuple[int, int], names: str = "xy") -> bytes:
    entries = [
        f'"{name}": {{"dtype": "F32", "shape": [2], "data_offsets": [{begin}, {end}]}}'
        for name, (begin, end) in zip(names, (first, second), strict=True)
    ]
    return ("{" + ", ".join(entries) + "}").encode()


@pytest.mark.parametrize(
    "header",
    [
        two((0, 8), (0, 8)),
        two((0, 8), (4, 12)),
        two((0, 8), (12, 20)),
        two((8, 16), (16, 24)),
        two((0, 8), (8, 16), "xx"),
        two((0, 8), (16, 8)),
        two((0, 8), (8, 2**64 - 1)),
    ],
    ids=["same", "overlap", "hole", "begins late", "twice", "backwards", "huge"],
)
def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path: Path, header: bytes) -> None:
    write_shard(tmp_path / WEIGHTS_FILE, header, bytes(16))
    refused(
        lambda: read_header(tmp_path / WEIGHTS_FILE), WEIGHTS_FILE, "not a complete safetensors"
    )


def test_tensors_lie_where_their_headers_say(original: Path) -> None:
    file = original / WEIGHTS_FILE
    data, right = file.read_bytes(), load_file(file)
    found = read_header(file)
    assert found.keys() == right.keys()
    for name, info in found.items():
        assert data[info.begin : info.end] == right[name].numpy().tobytes()


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/secret.safetensors",
        "sub/shard.safetensors",
        "./a.safetensors",
        "..",
        "pytorch_model.bin",
        "a.safetensors/",
        "",
        None,
        7,
        "a\nb.safetensors",
        "a\0b.safetensors",
        "\ud800.safetensors",
        "ä.safetensors",
        "x" * 300 + ".safetensors",
        "~root.safetensors",
        "C:\\windows\\a.safetensors",
        "-rf.safetensors",
        " a.safetensors",
        {"a": "b"},
        [[]],
        True,
        1.5,
    ],
)
def test_an_index_with_an_odd_file_name_is_refused(folder: Path, shard: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": shard}}))
    refused(lambda: open_checkpoint(folder), INDEX_FILE, "only plain .safetensors file names")
    refused(lambda: open_source(folder), INDEX_FILE, "only plain .safetensors file names")


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "a pipe"])
def test_a_shard_that_is_no_file_is_refused_unread(folder: Path, target: str) -> None:
    (folder / WEIGHTS_FILE).unlink()
    if target == "a pipe":
        os.mkfifo(folder / WEIGHTS_FILE)
    else:
        (folder / WEIGHTS_FILE).symlink_to(target)
    refused(lambda: open_checkpoint(folder), WEIGHTS_FILE, "missing")


def test_names_of_tensors_are_shown_short_and_printable(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "x\n\x1b[31m" + "y" * 10_000: torch.zeros(1)}, folder / WEIGHTS_FILE)
    refused(lambda: open_checkpoint(folder), "model", "has unexpected 1 tensors", r"'x\n\x1b[31m")
    write_shard(folder / WEIGHTS_FILE, b'{"a\\n' + b"b" * 9000 + b'": {"dtype": "F32"}}')
    refused(lambda: open_checkpoint(folder), WEIGHTS_FILE)


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


# Pickles and other files that nobody asked for.


def test_pickles_beside_good_weights_are_never_read(folder: Path) -> None:
    pickled = pickled_bomb()
    for name in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickled)
    load_dense(open_checkpoint(folder), torch.float32)
    assert EXECUTED == []


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors", "../other.safetensors"])
def test_the_configuration_cannot_name_other_weights(folder: Path, name: str) -> None:
    right = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    others = {key: torch.zeros_like(value) for key, value in right.items()}
    torch.save(others, folder / "adapter_model.bin")
    for place in (folder, folder.parent):
        save_file(
            {key: value.clone() for key, value in others.items()}, place / "other.safetensors"
        )
    change_config(folder, transformers_weights=name)
    loaded = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in right.items())


def test_the_weights_are_those_of_the_index_that_was_checked(folder: Path) -> None:
    right = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors, folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    save_file({key: value * 0 for key, value in tensors.items()}, folder / WEIGHTS_FILE)
    loaded = load_dense(open_checkpoint(folder), torch.float32).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in right.items())


# Configurations.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", [1e-5]),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rope_theta", {}),
        ("rope_parameters", 5),
        ("rope_parameters", {"rope_theta": float("nan"), "rope_type": "default"}),
        ("rope_scaling", {"type": "linear", "factor": float("inf")}),
        ("tie_word_embeddings", "yes"),
        ("tie_word_embeddings", 1),
        ("sliding_window", -1),
        ("sliding_window", "4096"),
        ("sliding_window", 10**30),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 64),
        ("head_dim", 1),
        ("head_dim", 3),
        ("vocab_size", 2**31),
    ],
)
def test_a_configuration_with_an_odd_value_is_refused_by_its_key(
    folder: Path, key: str, value: object
) -> None:
    change_config(folder, **{key: value})
    said = refused(lambda: open_checkpoint(folder), "config.json", "must be")
    assert key in said or (key == "num_attention_heads" and "head_dim" in said)


@pytest.mark.parametrize(
    "value", ["x" * 100_000, ["x" * 100_000] * 3, 10**4000], ids=["text", "list", "number"]
)
@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "architectures",
        "quantization_config",
        "hidden_act",
        "hidden_size",
        "num_local_experts",
        "rms_norm_eps",
        "rope_parameters",
    ],
)
def test_a_huge_value_is_not_repeated_in_the_error(folder: Path, key: str, value: object) -> None:
    change_config(folder, **{key: value})
    refused(lambda: open_checkpoint(folder), "config.json")


def test_a_configuration_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"

    def nested(depth: int) -> Path:
        file.write_text('{"a": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
        return file

    assert read_json(nested(MAX_DEPTH))
    refused(lambda: read_json(nested(MAX_DEPTH + 1)), "config.json", "nested deeper")
    refused(lambda: read_json(nested(900)), "config.json", "nested deeper")


def test_a_configuration_longer_than_allowed_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "config.json", MAX_HEADER_BYTES + 1)
    refused(lambda: open_checkpoint(folder), "config.json", "is larger than 16777216 bytes")


# Tokenizers and chat templates.


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"version": "1.0"}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 99999999999999}}}',
        b'{"version": "1.0", "model": {"type": "Python", "code": "import os"}}',
        b"[" * 100_000,
    ],
)
def test_a_tokenizer_of_which_none_can_be_made_is_refused(folder: Path, text: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(text)
    refused(lambda: Tokenizer.load(str(folder)), "model", "tokenizer's files cannot be used")


def test_a_tokenizers_code_is_never_run(folder: Path) -> None:
    trace = folder.parent / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    change_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
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
        tokenizer(template).chat_prompt([{"role": "user", "content": "hi"}])
    assert caught.value.field == "messages"
    assert "root:" not in caught.value.message
