"""Text that streams is the text that a plain decode gives, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from router.gateway.input.tokenizer import Tokenizer
from router.gateway.output.detokenize import ChoiceText, Detokenizer, StopMatcher
from tests.unit.gateway_fakes import EOS, tokenizer, vocab_size

ids_of_any_bytes = st.lists(st.integers(0, vocab_size() - 1), max_size=40)
text = st.text(alphabet=st.sampled_from("abc é中🙂"), max_size=30)
stop_strings = st.lists(st.text(alphabet="abc é", min_size=1, max_size=4), max_size=3)


def first_stop(whole: str, stops: list[str]) -> int | None:
    """Where the text is cut: at the stop that is complete first, then begins first."""
    found = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    return min(found)[1] if found else None


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(ids_of_any_bytes, ids_of_any_bytes)
def test_pieces_are_the_plain_decode_after_any_prompt(context: list[int], ids: list[int]) -> None:
    got = "".join(pieces(Detokenizer(tokenizer(), context), ids))
    assert got == tokenizer().decode(ids)


@given(st.lists(ids_of_any_bytes, max_size=6), st.data())
def test_it_is_the_same_text_however_tokens_come(
    groups: list[list[int]], data: st.DataObject
) -> None:
    context = data.draw(ids_of_any_bytes)
    together, one_by_one = (ChoiceText(tokenizer(), (), context) for _ in range(2))
    ids = [token_id for group in groups for token_id in group]
    got = "".join(together.push(group)[0] for group in groups) + together.flush()[0]
    assert got == "".join(one_by_one.push([i])[0] for i in ids) + one_by_one.flush()[0]


def test_a_long_text_is_decoded_in_short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokenizer().encode("a long text goes on, é by é, " * 40)
    decoded: list[int] = []

    def decode(self: Tokenizer, given: Sequence[int]) -> str:
        decoded.append(len(given))
        return plain(self, given)

    plain = Tokenizer.decode_kept
    monkeypatch.setattr(Tokenizer, "decode_kept", decode)
    got = "".join(pieces(Detokenizer(tokenizer()), ids))
    monkeypatch.undo()
    assert got == tokenizer().decode(ids)
    assert max(decoded) <= 20  # 16 tokens, one more, and the bytes of a character
    assert len(decoded) < len(ids) * 1.2


@given(text)
def test_no_piece_holds_half_a_character_and_bytes_are_those_of_the_text(whole: str) -> None:
    ids = tokenizer().encode(whole)
    parts = pieces(Detokenizer(tokenizer()), ids)
    assert "".join(parts) == whole
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert b"".join(tokenizer().token_bytes(token_id) for token_id in ids) == whole.encode()


def test_a_character_of_four_tokens_comes_whole_and_an_unfinished_one_at_the_end() -> None:
    by_bytes = {tokenizer().token_bytes(token_id): token_id for token_id in range(2, vocab_size())}
    ids = [by_bytes[bytes([byte])] for byte in "x🦊".encode()]
    assert pieces(Detokenizer(tokenizer()), ids) == ["x", "", "", "", "🦊", ""]
    cut = ["x", "", "", "", "\N{REPLACEMENT CHARACTER}"]
    assert pieces(Detokenizer(tokenizer()), ids[:-1]) == cut


def test_special_tokens_have_no_text() -> None:
    ids = tokenizer().encode("in the")
    assert "".join(pieces(Detokenizer(tokenizer()), [0, *ids, EOS])) == "in the"


@given(st.lists(text, max_size=12), stop_strings)
def test_the_matcher_cuts_at_the_first_stop_in_any_pieces(
    parts: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    out = ""
    found = False
    for part in parts:
        piece, found = matcher.push(part)
        out += piece
        if found:
            break
    else:
        out += matcher.flush()
    whole = "".join(parts)
    cut = first_stop(whole, stops)
    assert found == (cut is not None)
    assert out == (whole if cut is None else whole[:cut])


@given(text, stop_strings)
def test_a_choice_is_its_text_up_to_the_first_stop(whole: str, stops: list[str]) -> None:
    choice = ChoiceText(tokenizer(), stops)
    ids = tokenizer().encode(whole)
    got, used, stopped = choice.push(ids)
    if not stopped:
        rest, stopped = choice.flush()
        got += rest
    cut = first_stop(whole, stops)
    assert got == (whole if cut is None else whole[:cut])
    if cut is None:
        assert used == len(ids)
    else:
        # The token that completes the stop string counts, the one after it does not.
        assert any(stop in tokenizer().decode(ids[:used]) for stop in stops)
        assert not any(stop in tokenizer().decode(ids[: used - 1]) for stop in stops)


def test_a_possible_beginning_of_a_stop_is_kept_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("d") == ("ENd", False)
    assert matcher.push("EN") == ("", False)
    assert matcher.flush() == "EN"


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer in Llama's way: ▁ for a space, bytes as <0xNN>, the first space stripped."""
    pieces = ["<s>", "</s>", "▁the", "▁word", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = RawTokenizer(
        models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[])
    )
    space, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    return Tokenizer(fast, (EOS,))


@pytest.mark.parametrize("cleans", [False, True])
def test_the_text_is_the_one_of_transformers(sentencepiece: Tokenizer, cleans: bool) -> None:
    fast = sentencepiece._tokenizer
    fast.clean_up_tokenization_spaces = cleans
    for ids in ([], [3, 4], [0, 3, EOS, 4, 1], list(range(5, 261))):
        expected = fast.decode(
            [i for i in ids if i != EOS],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        assert sentencepiece.decode(ids) == expected


def test_a_class_that_decodes_in_its_own_way_is_asked(sentencepiece: Tokenizer) -> None:
    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **options: Any) -> str:
            return str(super()._decode(*args, **options)).upper()

    loud = Loud(tokenizer_object=sentencepiece._tokenizer.backend_tokenizer)
    assert Tokenizer(loud).decode([3, 4]) == sentencepiece.decode([3, 4]).upper() == "WORDS"


@pytest.mark.parametrize("size", [1, 8])
def test_text_after_shown_marks_keeps_its_first_space(sentencepiece: Tokenizer, size: int) -> None:
    """A special token, such as Mixtral's before its calls, is no context for the decoder."""
    ids = [3, EOS, 3, 4, EOS, EOS, 2, EOS]
    choice = ChoiceText(sentencepiece, (), [0, 2], shown={EOS: "[M]"})
    parts = [choice.push(ids[place : place + size])[0] for place in range(0, len(ids), size)]
    assert "".join([*parts, choice.flush()[0]]) == " word[M] words[M][M] the[M]"


def test_text_goes_on_with_its_space_and_whole_characters(sentencepiece: Tokenizer) -> None:
    ids = [2, *(5 + byte for byte in "é🦊".encode()), 3]
    parts = pieces(Detokenizer(sentencepiece, [0]), ids)
    assert "".join(parts) == "the" + "é🦊" + " word"
    assert "".join(pieces(Detokenizer(sentencepiece, [0, 2]), [3, 4, 3])) == " words word"
    assert sentencepiece.token_bytes(5 + 0xC3) == b"\xc3"
    assert sentencepiece.token_bytes(3) == b" word"
