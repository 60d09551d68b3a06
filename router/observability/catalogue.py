"""Every exported metric: name, kind, labels, meaning; ``docs/observability.md`` lists them.

Where vLLM has the same metric, name, unit and meaning are vLLM's, under ``expertmesh_``.

All label sets are bounded: ``model_name`` by the deployment; ``surface``, ``code``, ``reason``,
``finished_reason`` and ``transport`` by the code; ``key_name`` by the names that the file of keys
has had since the gateway's start; ``actor_id`` by the deployment's pools;
``kernel_class`` by the code and the kinds of processors and devices; ``replica`` by the live
processes. The largest is ``expert_tokens``: models x layers x experts x the actors that hold a
copy. ``expert_overflow_tokens`` has routers in place of the actors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
PREFIX = "expertmesh_"
LATENCY_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
LAYER_BUCKETS_S = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
)  # fmt: skip
"""Upper bounds of the histograms: whole requests, times between tokens, one MoE layer."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric; a counter's samples have ``_total`` after the name."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str

    @property
    def exported(self) -> str:
        """The name that queries use, for a histogram without its suffixes."""
        return self.name + ("_total" if self.kind == "counter" else "")


_MODEL = "model_name replica"
_ACTOR = "actor_id"
"""The labels of most metrics of a process and of an actor."""


def _family(kind: Kind, name: str, labels: str, text: str) -> Family:
    return Family(PREFIX + name, kind, tuple(labels.split()), text)


_counter = partial(_family, "counter")
_gauge = partial(_family, "gauge")
_histogram = partial(_family, "histogram")

# Metrics of gateways.
REQUESTS = _counter(
    "requests", "surface code replica", "Requests by surface and outcome; ok is success."
)
IN_FLIGHT = _gauge(
    "requests_in_flight", _MODEL, "Requests that a gateway has accepted and not ended."
)
SUCCESS = _counter(
    "request_success",
    "model_name finished_reason replica",
    "Choices finished, by why: stop, length or tool_calls.",
)
PROMPT_TOKENS = _counter("prompt_tokens", _MODEL, "Prompt tokens of accepted requests.")
GENERATION_TOKENS = _counter("generation_tokens", _MODEL, "Tokens sent to clients.")
INEXACT_TOKENS = _counter(
    "inexact_tokens",
    "model_name reason replica",
    "Tokens sent that are flagged as not exact, by on_expert_loss.",
)
PREDICTION_ROWS = _counter("prediction_rows", _MODEL, "Rows of accepted predictions of a mixture.")
ROUTER_CALLS = _counter(
    "router_calls",
    "model_name transport replica",
    "Calls of routers by a gateway: over a link of its own, or by serve.",
)
INEXACT_ROWS = _counter(
    "inexact_rows",
    "model_name reason replica",
    "Rows of predictions that are flagged as not exact, by on_expert_loss.",
)
SLOW_READERS = _counter(
    "slow_readers",
    "surface replica",
    "Streams that were ended because their clients did not read them.",
)
REFUSED_CALLERS = _counter(
    "refused_callers",
    "surface reason replica",
    "Requests refused for want of a key or a role: no_key, unknown_key, wrong_role.",
)
KEY_REQUESTS = _counter(
    "key_requests",
    "key_name replica",
    "Requests counted at their heads, by the name of their key: also those that are refused later, "
    "for their body or their tokens.",
)
KEY_TOKENS = _counter(
    "key_tokens",
    "key_name kind replica",
    "What a key's calls have used: prompt tokens, generated tokens, rows of mixtures.",
)
KEY_REFUSALS = _counter(
    "key_refusals",
    "key_name reason replica",
    "Calls refused by a limit of their key: requests_per_s, tokens_per_min, concurrent_tokens.",
)
FIRST_TOKEN = _histogram(
    "time_to_first_token_seconds", _MODEL, "From a checked request to its first token."
)
LATENCY = _histogram("e2e_request_latency_seconds", _MODEL, "From a checked request to its end.")

# Metrics of routers. Each choice of a request is a sequence.
RUNNING = _gauge("num_requests_running", _MODEL, "Sequences admitted to the cache.")
PARKED = _gauge(
    "num_requests_parked", _MODEL, "Admitted sequences that wait for an expert without a live copy."
)
WAITING = _gauge("num_requests_waiting", _MODEL, "Sequences that wait for room.")
KV_CACHE_USAGE = _gauge("kv_cache_usage_perc", _MODEL, "Share of the KV cache in use; 1 is all.")
QUEUE_TIME = _histogram(
    "request_queue_time_seconds",
    _MODEL,
    "From a sequence's arrival in the router to the first step that computes it.",
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", _MODEL, "From a sequence's first step to its first token."
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", _MODEL, "From a finished sequence's first token to its last."
)
INTER_TOKEN = _histogram(
    "inter_token_latency_seconds",
    _MODEL,
    "Between two tokens of a sequence, as the router samples them.",
)
PREFIX_QUERIES = _counter(
    "prefix_cache_queries",
    _MODEL,
    "Prompt tokens of admitted sequences, where a router shares the cache of equal prefixes.",
)
PREFIX_HITS = _counter(
    "prefix_cache_hits",
    _MODEL,
    "Prompt tokens that were found in the cache, and not computed.",
)
STEPS = _counter("engine_steps", _MODEL, "Steps of the engine.")
STEP_TOKENS = _counter(
    "engine_step_tokens", _MODEL, "Tokens that steps computed, prompts' and generated ones."
)
LAYER_TIME = _histogram(
    "moe_layer_seconds",
    _MODEL,
    "One MoE layer of a step, or of a piece of a prefill, as the router sees it: dispatch, the "
    "experts, combine.",
)
CALLS = _counter(
    "dispatch_calls",
    "model_name transport replica",
    "Frames sent to expert actors, by the transport that took them.",
)
RETRIES = _counter(
    "dispatch_retries", "model_name reason replica", "Frames that had to be sent again, by why."
)
OVERFLOW = _counter(
    "expert_overflow_tokens",
    "model_name layer expert replica",
    "Tokens that an expert had no room for, under router.expert_capacity.",
)

# Metrics of the controller and the placement.
EPOCH = _gauge("placement_epoch", "", "Epoch of the placement; a new controller's is new.")
VERSION = _gauge("placement_version", "", "Version of the placement within its epoch.")
MISSING = _gauge("missing_experts", "", "Experts without a live copy.")
LIVE_COPIES = _gauge("live_copies", "", "Live copies of the expert that has the fewest.")
MIN_COPIES = _gauge("min_copies", "", "Copies of each expert that are configured.")
LOOP_AGE = _gauge(
    "controller_loop_age_seconds",
    "",
    "Since the controller last finished a look at an expert actor, as the asked gateway knows.",
)
PROCESSES = _gauge("processes", "kind", "Routers, gateways and expert actors that are heard of.")
KERNELS = _gauge(
    "kernel_processes",
    "model_name kind kernel_class",
    "Routers and expert actors by the class of the kernels that they compute a model with.",
)

# Metrics of expert actors, from their latest heartbeats.
EXPERT_TOKENS = _counter(
    "expert_tokens",
    "model_name layer expert actor_id",
    "Token rows that an actor has computed, by expert.",
)
ACTOR_EXPERTS = _gauge("actor_experts", _ACTOR, "Experts that an actor holds.")
ACTOR_WEIGHTS = _gauge("actor_weight_bytes", _ACTOR, "Memory of the weights of an actor's experts.")
ACTOR_QUEUED = _gauge("actor_queued_rows", _ACTOR, "Rows that wait in an actor.")
ACTOR_BATCHES = _counter("actor_batches", _ACTOR, "Batches that an actor computed.")
ACTOR_FRAMES = _counter("actor_frames", _ACTOR, "Frames that an actor answered.")
ACTOR_BUSY = _counter("actor_busy_seconds", _ACTOR, "Time in which an actor computed.")
ACTOR_QUEUE = _counter(
    "actor_queue_seconds",
    _ACTOR,
    "Time that frames waited in an actor before it computed them, summed over frames.",
)
ACTOR_REPLACEMENTS = _counter(
    "actor_replacements",
    _ACTOR,
    "How often an actor was created anew: after its death, a hang, a move, other options.",
)
ACTOR_FAILED_BATCHES = _counter(
    "actor_failed_batches", _ACTOR, "Batches of an actor that raised an error."
)
ACTOR_FAILED_TESTS = _gauge(
    "actor_failed_tests", _ACTOR, "Self-tests of an actor that failed in a row; 0 is healthy."
)

# Metrics of expert actors that fail or are away, from the controller.
ACTOR_DEATHS = _gauge(
    "actor_deaths_in_a_row", _ACTOR, "Deaths of a failing actor that it has not outlived."
)
ACTOR_RETRY = _gauge("actor_retry_seconds", _ACTOR, "Until the next start of a failing actor.")
ACTOR_MISSING_BYTES = _gauge(
    "actor_missing_bytes", _ACTOR, "Memory that a failing actor lacks for its experts."
)
ACTOR_SLOWNESS = _gauge(
    "actor_slowness",
    _ACTOR,
    "How many times as long as the other actors of its pool an actor takes for like work, as "
    "routers measure it where experts have copies.",
)

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
