"""Every exported metric: name, kind, labels, meaning; ``docs/observability.md`` lists them.

Where vLLM has the same metric, name, unit and meaning are vLLM's, under ``expertmesh_``.

All label sets are bounded: ``model_name`` by the deployment; ``surface``, ``code``, ``reason``,
``finished_reason`` and ``transport`` by the code; ``actor_id`` by the deployment's pools;
``replica`` by the live processes. The largest is ``expert_tokens``: models x layers x experts x the
actors that hold a copy. ``expert_overflow_tokens`` has routers in place of the actors.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def _family(name: str, kind: Kind, labels: str, text: str) -> Family:
    return Family(PREFIX + name, kind, tuple(labels.split()), text)


# Metrics of gateways.
REQUESTS = _family(
    "requests", "counter", "surface code replica", "Requests by surface and outcome; ok is success."
)
IN_FLIGHT = _family(
    "requests_in_flight",
    "gauge",
    "model_name replica",
    "Requests that a gateway has accepted and not ended.",
)
SUCCESS = _family(
    "request_success",
    "counter",
    "model_name finished_reason replica",
    "Choices finished, by why: stop or length.",
)
PROMPT_TOKENS = _family(
    "prompt_tokens", "counter", "model_name replica", "Prompt tokens of accepted requests."
)
GENERATION_TOKENS = _family(
    "generation_tokens", "counter", "model_name replica", "Tokens sent to clients."
)
INEXACT_TOKENS = _family(
    "inexact_tokens",
    "counter",
    "model_name reason replica",
    "Tokens sent that are flagged as not exact, by on_expert_loss.",
)
SLOW_READERS = _family(
    "slow_readers",
    "counter",
    "surface replica",
    "Streams that were ended because their clients did not read them.",
)
FIRST_TOKEN = _family(
    "time_to_first_token_seconds",
    "histogram",
    "model_name replica",
    "From a checked request to its first token.",
)
LATENCY = _family(
    "e2e_request_latency_seconds",
    "histogram",
    "model_name replica",
    "From a checked request to its end.",
)

# Metrics of routers. Each choice of a request is a sequence.
RUNNING = _family(
    "num_requests_running", "gauge", "model_name replica", "Sequences admitted to the cache."
)
PARKED = _family(
    "num_requests_parked",
    "gauge",
    "model_name replica",
    "Admitted sequences that wait for an expert without a live copy.",
)
WAITING = _family(
    "num_requests_waiting", "gauge", "model_name replica", "Sequences that wait for room."
)
KV_CACHE_USAGE = _family(
    "kv_cache_usage_perc", "gauge", "model_name replica", "Share of the KV cache in use; 1 is all."
)
QUEUE_TIME = _family(
    "request_queue_time_seconds",
    "histogram",
    "model_name replica",
    "From a sequence's arrival in the router to the first step that computes it.",
)
PREFILL_TIME = _family(
    "request_prefill_time_seconds",
    "histogram",
    "model_name replica",
    "From a sequence's first step to its first token.",
)
DECODE_TIME = _family(
    "request_decode_time_seconds",
    "histogram",
    "model_name replica",
    "From a finished sequence's first token to its last.",
)
INTER_TOKEN = _family(
    "inter_token_latency_seconds",
    "histogram",
    "model_name replica",
    "Between two tokens of a sequence, as the router samples them.",
)
STEPS = _family("engine_steps", "counter", "model_name replica", "Steps of the engine.")
STEP_TOKENS = _family(
    "engine_step_tokens",
    "counter",
    "model_name replica",
    "Tokens that steps computed, prompts' and generated ones.",
)
LAYER_TIME = _family(
    "moe_layer_seconds",
    "histogram",
    "model_name replica",
    "One MoE layer of a step as the router sees it: dispatch, the experts, combine.",
)
CALLS = _family(
    "dispatch_calls",
    "counter",
    "model_name transport replica",
    "Frames sent to expert actors, by the transport that took them.",
)
RETRIES = _family(
    "dispatch_retries",
    "counter",
    "model_name reason replica",
    "Frames that had to be sent again, by why.",
)
OVERFLOW = _family(
    "expert_overflow_tokens",
    "counter",
    "model_name layer expert replica",
    "Tokens that an expert had no room for, under router.expert_capacity.",
)

# Metrics of the controller and the placement.
EPOCH = _family(
    "placement_epoch", "gauge", "", "Epoch of the placement; a new controller's is new."
)
VERSION = _family("placement_version", "gauge", "", "Version of the placement within its epoch.")
MISSING = _family("missing_experts", "gauge", "", "Experts without a live copy.")
LIVE_COPIES = _family("live_copies", "gauge", "", "Live copies of the expert that has the fewest.")
MIN_COPIES = _family("min_copies", "gauge", "", "Copies of each expert that are configured.")
LOOP_AGE = _family(
    "controller_loop_age_seconds",
    "gauge",
    "",
    "Since the controller last finished a look at an expert actor, as the asked gateway knows.",
)
PROCESSES = _family(
    "processes", "gauge", "kind", "Routers, gateways and expert actors that are heard of."
)

# Metrics of expert actors, from their latest heartbeats.
EXPERT_TOKENS = _family(
    "expert_tokens",
    "counter",
    "model_name layer expert actor_id",
    "Token rows that an actor has computed, by expert.",
)
ACTOR_EXPERTS = _family("actor_experts", "gauge", "actor_id", "Experts that an actor holds.")
ACTOR_WEIGHTS = _family(
    "actor_weight_bytes", "gauge", "actor_id", "Memory of the weights of an actor's experts."
)
ACTOR_QUEUED = _family("actor_queued_rows", "gauge", "actor_id", "Rows that wait in an actor.")
ACTOR_BATCHES = _family("actor_batches", "counter", "actor_id", "Batches that an actor computed.")
ACTOR_FRAMES = _family("actor_frames", "counter", "actor_id", "Frames that an actor answered.")
ACTOR_BUSY = _family(
    "actor_busy_seconds", "counter", "actor_id", "Time in which an actor computed."
)
ACTOR_QUEUE = _family(
    "actor_queue_seconds",
    "counter",
    "actor_id",
    "Time that frames waited in an actor before it computed them, summed over frames.",
)
ACTOR_REPLACEMENTS = _family(
    "actor_replacements",
    "counter",
    "actor_id",
    "How often an actor was created anew: after its death, a hang, a move, other options.",
)

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
