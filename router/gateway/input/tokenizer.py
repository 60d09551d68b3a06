"""A served model in a gateway, without weights: text to ids, ids to text, chat template."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cluster.errors import CheckpointError, InvalidRequestError
from experts.checkpoint.folder import language_model
from experts.checkpoint.identity import text_identity
from experts.checkpoint.remote.peers import Neighbours
from experts.checkpoint.remote.remote_files import open_model
from router.gateway.input.tools.formats import ChatFormat, format_of
from router.gateway.input.tools.template import ChatTemplate
from router.served import ServedModel

if TYPE_CHECKING:
    from llguidance import LLTokenizer


_SLICES = ("[a-zA-Z0-9 ]{1,10}", "[a-z ]{1,10}")
"""Tokens that a grammar often takes all of: it is asked once for all that fit one of these."""


class Tokenizer:
    """Encodes prompts and decodes tokens; special tokens and ``eos_token_ids`` have no text."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decode = _decoder_of(tokenizer)
        added = tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        self._eos_ids = frozenset(eos_token_ids)
        self.skipped_ids = frozenset(special | set(tokenizer.all_special_ids) | set(eos_token_ids))
        self._is_byte_level = _is_byte_level(tokenizer)
        # No token has more bytes than this, so a prompt's bytes bound its tokens from below.
        self.max_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate(self._template_source(), self._rendered)

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How the model writes reasoning and tool calls."""
        added = self._tokenizer.added_tokens_decoder
        return format_of(
            self._template_source(),
            {str(token.content): token_id for token_id, token in added.items()},
            self.skipped_ids,
            self._eos_ids,
            getattr(self._tokenizer, "response_template", None),
        )

    @classmethod
    def load(cls, path: str, eos_token_ids: Sequence[int] = ()) -> Tokenizer:
        """Load the tokenizer in folder ``path``; no code from the folder is run.

        Raises :class:`CheckpointError` for files that transformers cannot load.
        """
        # Imported here, since the command line and the client must not load transformers.
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(
                path, config=_config(path), trust_remote_code=False, local_files_only=True
            )
            _check_response_template(loaded)
            return cls(loaded, eos_token_ids)
        except BaseException as error:
            if not _is_failure(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the tokenizer's files cannot be used ({type(error).__name__}: {reason})", path
            ) from None

    def vocabulary(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        """Return the tokens as grammars need them; takes some tenths of a second.

        ``vocab_size`` is the model's. An end that the tokenizer does not have, beside others,
        ends no answer of a form. Raises :class:`CheckpointError` for a tokenizer without a fast
        form.
        """
        from llguidance import LLTokenizer
        from llguidance.hf import from_tokenizer

        try:
            num_tokens = max(vocab_size, len(self._tokenizer))
            known_ends = [end for end in eos_token_ids if end < len(self._tokenizer)]
            slices = [*LLTokenizer.general_slices(), *_SLICES]
            ends = known_ends or list(eos_token_ids)
            return from_tokenizer(self._tokenizer, num_tokens, ends, slices)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"its tokenizer cannot be used with grammars ({error})", "tokenizer"
            ) from None

    def encode(
        self, text: str, add_special_tokens: bool = True, where: str = "prompt"
    ) -> list[int]:
        """Return the ids of ``text``, with or without the tokenizer's begin-of-sequence token.

        Raises :class:`InvalidRequestError` for the field ``where``, whose text the tokenizer fails
        on.
        """
        try:
            ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            return list(ids["input_ids"])
        except BaseException as error:
            if not _is_failure(error):
                raise
            reason = type(error).__name__
            raise InvalidRequestError(
                f"the model's tokenizer fails on this text ({reason})", where
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens; bytes that are not UTF-8 become �."""
        return self.decode_kept([i for i in ids if i not in self.skipped_ids])

    def decode_kept(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, of which none is in ``skipped_ids``; see :meth:`decode`."""
        return str(self._decode(ids))

    def whole_text(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens by their names."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @functools.lru_cache(maxsize=65_536)  # noqa: B019 - a tokenizer lives as long as the process
    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; those of a special token are its name."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if token_id in self.skipped_ids:
            return str(piece).encode()
        if self._is_byte_level:
            byte_of = _bytes_of_characters()
            if all(char in byte_of for char in piece):
                return bytes(byte_of[char] for char in piece)
            return str(piece).encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Return one token as text; a part of a character becomes �."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _template_source(self) -> str:
        """Return the chat template that is rendered for tools, empty where there is none."""
        if not self._tokenizer.chat_template:
            return ""
        return str(self._tokenizer.get_chat_template(tools=[]))

    def _rendered(
        self,
        messages: list[dict[str, Any]],
        is_opened: bool,
        tools: list[dict[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> str:
        """Return what the chat template makes of ``messages``; see :class:`ChatTemplate`."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template; send a prompt", "messages")
        try:
            # apply_chat_template would leave out contents that are none.
            [text], _ = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._tokenizer.get_chat_template(tools=tools),
                add_generation_prompt=is_opened,
                **{**self._tokenizer.special_tokens_map, **options},
            )
        except Exception as error:  # a template is a program
            # A template refuses by raise_exception, with a text for the client.
            reason = f": {error}" if isinstance(error, TemplateError) else ""
            raise InvalidRequestError(
                f"the model's chat template rejects the messages{reason}", "messages"
            ) from None
        return str(text)


def _config(path: str) -> Any:
    """Return the model's configuration, by which transformers may choose a tokenizer's class.

    A family's own class refuses values that its checkpoints have, and that the router translates
    (DBRX's whole numbers where it wants others); then it is read without such a class.
    """
    from transformers import AutoConfig, PreTrainedConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception:  # huggingface_hub's errors of validation have no common class
        return PreTrainedConfig.from_pretrained(path, local_files_only=True)


def _check_response_template(tokenizer: Any) -> None:
    """Raise ``ValueError`` for a response template that transformers cannot parse by."""
    from transformers.utils.chat_parsing import ResponseParser

    if getattr(tokenizer, "response_template", None) is not None:
        ResponseParser(tokenizer.response_template, prefix="")


def _decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return the function from ids to text, without special tokens and with all spaces.

    It is the tokenizer's own where its class changes nothing: transformers looks at the ids' kinds
    first, which takes longer than to decode them.
    """
    from transformers import PreTrainedTokenizerFast

    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if issubclass(kind, plain) and (kind.decode, kind._decode) == (plain.decode, plain._decode):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _is_failure(error: BaseException) -> bool:
    # tokenizers is Rust; its panic is not an Exception.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder")
    return "ByteLevel" in json.dumps(decoder)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


@dataclass(frozen=True, slots=True)
class GatewayModel:
    """A served model and its loaded tokenizer."""

    info: ServedModel
    tokenizer: Tokenizer


def load_models(
    models: tuple[ServedModel, ...], neighbours: Neighbours | None
) -> dict[str, GatewayModel]:
    """Load the tokenizer of each model; returns them by id, in the given order."""
    return {model.id: GatewayModel(model, load_tokenizer(model, neighbours)) for model in models}


def load_tokenizer(model: ServedModel, neighbours: Neighbours | None) -> Tokenizer:
    """Load a model's tokenizer; raises :class:`CheckpointError` where its files are others.

    The identity of the weights does not cover them. A node without the files asks ``neighbours``.
    """
    opened = open_model(model.path, model.source.identity, neighbours)
    checkpoint = language_model(opened)
    if model.text_identity and text_identity(checkpoint) != model.text_identity:
        raise CheckpointError(
            "its tokenizer, chat template or generation_config.json differ from those of the "
            "served checkpoint; deploy again",
            str(checkpoint.folder),
        )
    if checkpoint.remote is None:
        return Tokenizer.load(str(checkpoint.folder), model.eos_token_ids)
    with TemporaryDirectory(prefix="expertmesh-") as folder:
        for name, data in checkpoint.remote.small_files.items():
            (Path(folder) / name).write_bytes(data)
        checkpoint.remote.release()
        return Tokenizer.load(folder, model.eos_token_ids)
