"""The arguments and results of both clients, and their own error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from cluster.errors import UnavailableError
from router.messages.request import PromptLogprobs, TokenLogprobs, Usage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


class UnreachableError(UnavailableError):
    """No ExpertMesh server answers at the address."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One choice, or a new piece of a choice in a stream.

    ``finish_reason`` is ``stop``, ``length`` or, while the choice goes on, ``None``. ``exact`` is
    false when an expert's share was replaced or dropped for one of its tokens, or for an earlier
    token. ``usage`` is set on the first choice of :meth:`Client.generate` and on the last piece of
    a stream. ``prompt_logprobs``, where they were asked for, are those of the prompt's tokens,
    ``None`` for the first; in a stream they come in pieces, before the choice's first token.
    ``routed_experts``, where they were asked for, are the experts of the prompt's tokens and of all
    generated ones but the last, ids [tokens, MoE layers, K]; in a stream, of the tokens that were
    computed since the piece before.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None
    exact: bool
    usage: Usage | None
    prompt_logprobs: tuple[PromptLogprobs | None, ...] = ()
    routed_experts: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a model: its id, and its text; a ``special`` one is no text, and has a name."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The description of a served model; ``moe_layers`` have experts."""

    id: str
    family: str
    num_layers: int
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_model_len: int
    dtype: str
    moe_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """The outputs of a mixture for the rows of a request, by name.

    An array is [P, *shape], P being the rows; texts are numpy's unicode. ``exact`` is false when an
    expert was replaced or left out for one of the rows. ``identity`` is the mixture's.
    """

    outputs: Mapping[str, np.ndarray]
    exact: bool
    identity: str


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The description of a mixture's input or output; -1 in ``shape`` is any length.

    ``datatype`` is that of the Open Inference Protocol, such as ``FP32``.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MixtureInfo:
    """The description of a served mixture; its experts take the rows of the first input."""

    id: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; ``None`` leaves a field to the server's default.

    ``prompt_logprobs`` asks for log probabilities of the prompt's tokens, with so many of the
    likeliest beside each. ``echo`` puts the prompt before the text, and with ``logprobs`` asks for
    as many ``prompt_logprobs``. With either, ``max_tokens`` may be 0. A choice has at least
    ``min_tokens``, ends after any of ``stop_token_ids``, and has none of ``bad_words``.
    ``structured_outputs`` is the form of the answer as HTTP's field has it: one of ``json`` (a
    schema), ``regex``, ``choice``, ``grammar`` and ``json_object``. ``return_routed_experts`` asks
    for the experts of each token. ``routed_experts`` are integers [tokens, MoE layers, K], the
    experts of the prompt's tokens and of as many later ones as there are rows.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int | None = None
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    structured_outputs: Mapping[str, Any] | None = None
    return_routed_experts: bool | None = None
    routed_experts: ArrayLike | None = field(default=None, compare=False)


class RequestOptions(TypedDict, total=False):
    """What a request may say beside its prompt and sampling; the names are the message's fields.

    ``on_expert_loss`` is ``strict``, ``next_expert`` or ``drop``; the default is the deployment's.
    A request of a lower ``priority`` is handled earlier. Only requests with the same ``cache_salt``
    share the key/value cache of a prompt.
    """

    on_expert_loss: str | None
    priority: int
    cache_salt: str
