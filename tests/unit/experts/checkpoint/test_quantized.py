"""Quantised checkpoints: served as transformers serves the weights that their codes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cluster.errors import CheckpointError
from cluster.wire.tensors import from_array
from experts.checkpoint import hashes
from experts.checkpoint.checkpoint import open_checkpoint
from experts.checkpoint.expert_weights import load_expert, read_tensor
from experts.checkpoint.identity import identity_of
from experts.checkpoint.remote.remote_files import open_model
from router.engine.batch import pack
from router.model.model import load_dense
from router.ops.plan.plan import Wish, make_plan
from router.ops.plan.source import find_model
from router.served import check_file
from tests.arrays import loaded
from tests.checkpoints import transformers_tokens
from tests.family_checkpoints import SAVERS
from tests.local_cluster import LocalCluster, greedy_request
from tests.quantise import (
    CASES,
    MXFP4_CONFIG,
    WEIGHTS,
    Quantised,
    State,
    fp8_values,
    make,
    mxfp4_values,
    write_config,
)
from tests.unit.experts.checkpoint.remote.test_remote_files import HERE, FakeNeighbours
from tests.unit.experts.families.test_families import check_tokens
from tests.unit.router.engine.test_engine import check_greedy, prompt_of
from workshop.convert.write import convert

pytestmark = pytest.mark.usefixtures("one_thread")
Change = Callable[[State], object]


@pytest.fixture(scope="module", params=sorted(CASES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    return make(CASES[request.param], tmp_path_factory.mktemp(request.param))


@torch.inference_mode()
def test_logits_equal_transformers_on_the_dequantised_weights(made: Quantised) -> None:
    cluster = LocalCluster(made.folder, num_actors=2, threaded=False)
    prompt = prompt_of(30, 3)
    cluster.scheduler.add(greedy_request("r", prompt, 1))
    step = pack(cluster.scheduler.schedule(), cluster.model.attention)
    ours = cluster.forward(step)
    theirs = made.oracle(torch.tensor([prompt])).logits[0, -1:]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_tensor_stands_for_what_its_codes_say(made: Quantised) -> None:
    checkpoint = open_checkpoint(made.folder)
    original = load_file(made.folder.parent / "original" / WEIGHTS)
    assert 0 < len(checkpoint.packed) < len(made.values)
    for name, values in made.values.items():
        if name not in checkpoint.packed:
            assert torch.equal(values, original[name])
        count = values.shape[0]
        for begin, end in [(0, 1), (count - 1, count), (1, count), (count // 3, 2 * count // 3)]:
            read = from_array(read_tensor(checkpoint, name, "float32", (begin, end)))
            assert torch.equal(read, values[begin:end]), name
        assert torch.equal(from_array(read_tensor(checkpoint, name, "float32")), values), name
    narrow = from_array(read_tensor(checkpoint, next(iter(checkpoint.packed)), "bfloat16"))
    assert narrow.dtype == torch.bfloat16


def test_held_bytes_are_those_of_the_dequantised_weights(made: Quantised) -> None:
    quantised, plain = open_checkpoint(made.folder), open_checkpoint(made.plain)
    for dtype in ("float32", "bfloat16"):
        layer_id = quantised.shape.layers[0]
        held = load_expert(quantised, layer_id, 1, dtype).num_bytes
        assert quantised.expert_bytes(dtype) == plain.expert_bytes(dtype) == held
        plans = [make_plan(find_model(str(f), dtype), Wish()) for f in (made.folder, made.plain)]
        assert plans[0].expert_bytes == held
        assert plans[0].router_weight_bytes == plans[1].router_weight_bytes
        assert plans[0].model.note.startswith(f"stored in {quantised.stored}, dequantised")
        assert plans[1].model.note == ""
    shape = quantised.shape
    total_mb = len(shape.layers) * shape.num_experts * quantised.expert_bytes("float32") / 1e6
    _, line = check_file(deployment(made.folder))
    assert f"float32 (stored as {quantised.stored}), experts {total_mb:.1f} MB" in line


def deployment(folder: Path) -> Path:
    file = folder.parent / "deployment.yaml"
    file.write_text(
        "applications:\n- name: a\n  import_path: router.app:build\n"
        f"  args: {{models: [{{id: m, path: {folder}}}]}}\n"
    )
    return file


def test_another_node_sends_the_codes_not_the_values(
    made: Quantised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "LEAF_BYTES", 512)  # whole leaves travel
    here = open_checkpoint(made.folder)
    neighbours = FakeNeighbours({"a": made.folder})
    there = open_model(HERE, identity_of(here), neighbours)
    layer_id = here.shape.layers[-1]
    ours, right = (loaded(c, layer_id, 2, "float32") for c in (there, here))
    assert torch.equal(ours.gate_up, right.gate_up)
    assert torch.equal(ours.down, right.down)
    assert there.remote is not None
    assert there.remote.fetched_bytes < right.num_bytes / 3
    dense, expected = (load_dense(c, torch.float32).state_dict() for c in (there, here))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_model_in_bf16_beside_codes_is_bf16_and_may_be_held_in_fp32(
    tmp_path: Path, name: str
) -> None:
    made = make(CASES[name], tmp_path, dtype=torch.bfloat16)
    assert open_checkpoint(made.folder).dtype == "bfloat16"
    check_tokens(made.folder, made.oracle, 20, 4, dtype="float32")


def test_convert_makes_a_plain_checkpoint_of_it(made: Quantised, tmp_path: Path) -> None:
    done = convert(made.folder, tmp_path / "fp32", "float32", 100_000, lambda *_: None)
    assert set(done.source_dtypes) == {"float32", "quantised"}
    checkpoint = open_checkpoint(tmp_path / "fp32")
    assert (checkpoint.stored, checkpoint.dtype) == (None, "float32")
    assert checkpoint.tensors.keys() == made.values.keys()
    for name, values in made.values.items():
        assert torch.equal(from_array(read_tensor(checkpoint, name, "float32")), values), name


def test_layers_that_predict_a_token_more_may_be_quantised_and_are_not_read(tmp_path: Path) -> None:
    folder = make(CASES["deepseek_v3"], tmp_path).folder
    state = load_file(folder / WEIGHTS)
    last = {n: t for n, t in state.items() if n.startswith("model.layers.2.mlp.experts.")}
    more = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in last.items()}
    save_file(state | more, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert open_checkpoint(folder).tensors.keys() == state.keys()
    convert(folder, tmp_path / "out", "auto", 10**9, lambda *_: None)
    assert open_checkpoint(tmp_path / "out").dtype == "bfloat16"


# The tests' own decoding against transformers', where that runs on a CPU.


def test_codes_are_decoded_as_transformers_does() -> None:
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 6, 3), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_values(blocks, scales), theirs)
    codes, scales = (torch.randn(64, 48) * 90).to(torch.float8_e4m3fn), torch.rand(2, 2)
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(fp8_values(codes, scales, (32, 24)), theirs)


def test_transformers_itself_loads_gpt_oss_to_the_same_tokens(tmp_path: Path) -> None:
    made = make(CASES["gpt_oss"], tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        made.folder,
        dtype=torch.float32,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    prompt = prompt_of(9, 2)
    check_greedy(transformers_tokens(theirs, prompt, 4), made.oracle, prompt, 4)


# What is refused, before anything is started.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cases = {"fp8": "qwen3_moe", "mxfp4": "gpt_oss"}
    return {k: make(CASES[name], tmp_path_factory.mktemp(k)).folder for k, name in cases.items()}


def refused(folder: Path, name: str, *words: str) -> None:
    """Check a deployment of the folder, which must end with an error that names a file."""
    with pytest.raises(CheckpointError) as caught:
        check_file(deployment(folder))
    assert f"models[0].path: {folder}" in caught.value.field
    assert caught.value.field.endswith(name)
    for word in words:
        assert word in caught.value.message


def changed(source: Path, folder: Path, change: Change = lambda state: None, **keys: Any) -> Path:
    """Copy a checkpoint with changed tensors and keys of ``quantization_config``."""
    folder.mkdir()
    state = load_file(source / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    given = json.loads((source / "config.json").read_text())["quantization_config"]
    write_config(source, folder, quantization_config=given | keys)
    return folder


BLOCK_WORDS = "weight_block_size must be two positive integers"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("quant_method", ["fp8"], "quant_method must be fp8 or mxfp4"),
        ("fmt", "e5m2", "quantization_config.fmt must be e4m3 (given: 'e5m2')"),
        ("activation_scheme", "static", "activation_scheme must be dynamic (given: 'static')"),
        ("weight_block_size", None, BLOCK_WORDS),
        ("weight_block_size", [128], BLOCK_WORDS),
        ("weight_block_size", [0, 128], BLOCK_WORDS),
        ("weight_block_size", [128, "128"], BLOCK_WORDS),
    ],
)
def test_an_unknown_quantisation_is_refused_by_its_key(
    folders: dict[str, Path], tmp_path: Path, key: str, value: object, words: str
) -> None:
    refused(changed(folders["fp8"], tmp_path / "m", **{key: value}), "config.json", words)


MATRIX = "model.layers.1.mlp.experts.3.down_proj.weight"
"""A matrix of layer 1, [64, 48]: it has two blocks by two."""


SCALES, NORM = f"{MATRIX}_scale_inv", "model.norm.weight"
STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("kind", "name", "change", "file", "words"),
    [
        ("fp8", SCALES, None, "m", "lacks 1 tensors"),
        ("fp8", MATRIX, torch.Tensor.float, "m", "has unexpected 1 tensors"),
        ("fp8", MATRIX, lambda codes: codes[:32], WEIGHTS, "has shape [32, 48]"),
        ("fp8", SCALES, lambda _: torch.ones(3, 2), WEIGHTS,
         "has shape [3, 2]; config.json says [2, 2]"),
        ("fp8", SCALES, torch.Tensor.half, WEIGHTS,
         "has dtype F16; for fp8 it must be F32 or BF16"),
        ("fp8", MATRIX, lambda codes: codes.view(torch.uint8), "m", "has unexpected 1 tensors"),
        ("fp8", NORM, lambda norm: norm.to(torch.float8_e4m3fn), WEIGHTS,
         "tensor model.norm.weight is quantised but not a matrix"),
        ("mxfp4", f"{STACK}_scales", None, "m", "lacks 1 tensors"),
        ("mxfp4", f"{STACK}_blocks", None, "m", "lacks 1 tensors"),
        ("mxfp4", STACK, lambda _: torch.zeros(8, 64, 64), "m", "has unexpected 1 tensors"),
        ("mxfp4", f"{STACK}_scales", lambda scales: scales[:, :, :1].clone(), WEIGHTS,
         "has shape [8, 64, 1]; config.json says [8, 64, 2]"),
        ("mxfp4", f"{STACK}_blocks", torch.Tensor.float, WEIGHTS,
         "has dtype F32; for mxfp4 it must be U8"),
    ],
)  # fmt: skip
def test_codes_and_scales_that_do_not_fit_are_refused(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str, change: Any, file: str,
    words: str,
) -> None:  # fmt: skip
    def spoil(state: State) -> None:
        tensor = state.pop(name, None)
        if change is not None:
            state[name] = change(tensor)

    refused(changed(folders[kind], tmp_path / "m", spoil), file, words)


def test_codes_without_a_word_in_the_configuration_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["mxfp4"], tmp_path / "mxfp4")
    write_config(folders["mxfp4"], folder, quantization_config=None)
    refused(folder, "mxfp4", "lacks 8 tensors")
    folder = changed(
        folders["fp8"], tmp_path / "m", lambda s: [s.pop(n) for n in list(s) if "scale_inv" in n]
    )
    write_config(folders["fp8"], folder, quantization_config=None)
    refused(folder, WEIGHTS, "has dtype F8_E4M3", "supported: F32, BF16, F16")


def test_sizes_that_make_no_blocks_are_refused(tmp_path: Path) -> None:
    """One stack, whose rows are no multiple of 32, has the name of codes."""
    original, folder = tmp_path / "original", tmp_path / "m"
    SAVERS["gpt_oss"](original, intermediate_size=48)
    folder.mkdir()
    state = load_file(original / WEIGHTS)
    state[f"{STACK}_blocks"] = state.pop(STACK).to(torch.uint8)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    write_config(original, folder, quantization_config=MXFP4_CONFIG)
    refused(folder, WEIGHTS, "which has no blocks of 32 in its second dimension")
