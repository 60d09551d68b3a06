"""Dense models in GGUF become mixtures with their weights, their tokenizer and their template."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoTokenizer

from cluster.errors import CheckpointError
from tests.foreign_layouts import packed_bf16, packed_q8, q8_values
from tests.unit.workshop.folders.dense_models import byte_level, save_dense, write_dense_gguf
from tests.unit.workshop.folders.edits import write_letters
from tests.unit.workshop.folders.upcycle.test_upcycle import assert_is_dense
from workshop.convert.gguf_file import GgufFile
from workshop.convert.gguf_tokenizer import write_tokenizer
from workshop.folders.dense_model import opened_dense
from workshop.folders.making import make_folder
from workshop.folders.options import UpcycleOptions
from workshop.folders.upcycle.command import Upcycle

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = (
    "the quick 1234 foxes",
    "  two  spaces\n\nand lines\t",
    "naïve — 漢字 🙂 12",
    "<eos>the<bos>",
)


def q8_everywhere(model: torch.nn.Module) -> None:
    """Give a model's matrices the values that they have in Q8_0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(q8_values(parameter))


@pytest.mark.parametrize(
    ("name", "packing"), [("llama", "q8"), ("llama-tied", "bf16"), ("qwen2", "f32")]
)
def test_a_dense_gguf_becomes_the_same_model(name: str, packing: str, tmp_path: Path) -> None:
    dense = save_dense(name, tmp_path / "dense", torch.bfloat16, intermediate_size=96)
    if packing == "q8":
        q8_everywhere(dense)
    packs = {
        "q8": {"pack": packed_q8},
        "bf16": {"pack": lambda weight: packed_bf16(weight.bfloat16())},
        "f32": {},
    }
    write_dense_gguf(tmp_path / "model.gguf", dense, **packs[packing])
    text = write_letters(tmp_path / "letters.txt")
    options = UpcycleOptions(experts=4, shared=2, dtype="float32", sequences=4, sequence_length=32)
    with opened_dense(str(tmp_path / "model.gguf")) as model:
        record = make_folder(Upcycle(model, options), tmp_path / "out", [text])
    assert (record.source, record.family) == ("model.gguf", dense.config.model_type)
    assert_is_dense(tmp_path / "out", dense)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = byte_level(320)
    for line in TEXTS:
        assert loaded(line)["input_ids"] == expected.encode(line).ids
    chat = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi\n"


def write_metadata(file: Path, **fields: object) -> GgufFile:
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(file)


def test_a_sentence_piece_tokenizer_merges_by_score(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=pieces, show_progress=False)
    trained.train_from_iterator(
        ["a hen in the ten then thin tin the heat of the theatre"] * 3, trainer
    )
    vocab = trained.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    file = write_metadata(
        tmp_path / "file.gguf",
        tokenizer_model="llama",
        token_list=tokens,
        token_scores=[0.0 if n < 259 else float(259 - n) for n in range(len(tokens))],
        token_types=[2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        bos_token_id=1,
        eos_token_id=2,
    )
    write_tokenizer(file, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for line in ("the hen", "then heat  theatre", "漢 the"):
        assert loaded(line)["input_ids"] == [1, *trained.encode(line).ids]
        assert loaded.decode(loaded(line)["input_ids"], skip_special_tokens=True) == line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_model": "t5"}, "tokenizer.ggml.model 't5' is not known; known: gpt2, llama"),
        ({"tokenizer_model": "gpt2", "token_list": ["a", "a"]}, "has a duplicate token"),
        ({"tokenizer_model": "gpt2", "token_list": ["a"], "tokenizer_pre": "other"},
         "tokenizer.ggml.pre 'other' is not known; known: gpt-2, smollm"),
        ({"tokenizer_model": "gpt2", "token_list": ["a"], "tokenizer_pre": "gpt-2",
          "token_merges": ["a b"]}, "its tokenizer cannot be used"),
        ({"tokenizer_model": "llama", "token_list": ["a"], "token_scores": [1.0, 2.0]},
         "tokenizer.ggml.scores must be as long as the tokens"),
    ],
)  # fmt: skip
def test_a_wrong_tokenizer_is_refused(
    fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_tokenizer(write_metadata(tmp_path / "file.gguf", **fields), tmp_path)
