"""Noisy top-k gating, the losses that balance the experts, and GShard's controls.

After Shazeer et al. 2017, "Outrageously Large Neural Networks", sections 2.1 and 4, appendix A;
groups, capacity and the random second expert after Lepikhin et al. 2020, "GShard" (arXiv
2006.16668), section 2.2 and algorithm 1.
T: tokens, E: experts, k: experts per token, H: hidden size, G: groups, S: tokens of a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from workshop.estimators.adaptive.noisy_gate import chosen_probabilities, squared_variation
from workshop.train.settings import GatingSettings, GroupSettings


class TrainingGate(MixtralTopKRouter):
    """Mixtral's gate with noise in training mode; in eval mode it equals Mixtral's bit by bit.

    A forward pass in training mode sets two attributes. `balancing_loss` is this layer's scalar
    loss, equations 7 and 11. `overflow_share` is the share of the sent choices beyond the experts'
    capacity, 0 without groups. The noise comes from `noise_generator`, so it is a function of the
    seed.
    """

    def __init__(
        self, config: MixtralConfig, gating: GatingSettings, noise_generator: torch.Generator
    ) -> None:
        super().__init__(config)
        self.gating = gating
        self.noise_generator = noise_generator
        self.balancing_loss = torch.zeros(())
        self.overflow_share = 0.0
        if gating.noisy:
            self.noise_weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return router_logits [T, E], topk_weights [T, k], topk_ids [T, k] of [..., H]."""
        if not self.training:
            return tuple(super().forward(hidden_states))
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states, self.weight)
        noisy_logits = router_logits
        loss = router_logits.new_zeros(())
        if self.gating.noisy:
            noise_std = F.softplus(F.linear(hidden_states, self.noise_weight))
            noise = torch.empty_like(noise_std).normal_(generator=self.noise_generator)
            noisy_logits = router_logits + noise * noise_std
            chosen = chosen_probabilities(router_logits, noise_std, noisy_logits, self.top_k)
            loss = loss + self.gating.load_weight * squared_variation(chosen.sum(0))
        topk_logits, topk_ids = noisy_logits.topk(self.top_k, dim=-1)
        topk_weights = topk_logits.float().softmax(dim=-1)  # equations 3 and 5
        zeros = topk_weights.new_zeros(len(topk_ids), self.num_experts)
        importance = zeros.scatter(1, topk_ids, topk_weights).sum(0)
        self.balancing_loss = loss + self.gating.importance_weight * squared_variation(importance)
        if self.gating.groups is not None:
            topk_weights = self._within_groups(topk_weights, topk_ids, self.gating.groups)
        return router_logits, topk_weights, topk_ids

    def _within_groups(
        self, topk_weights: torch.Tensor, topk_ids: torch.Tensor, groups: GroupSettings
    ) -> torch.Tensor:
        """Return the weights [T, k], zero for a choice that is not sent or exceeds a capacity."""
        sent = torch.ones_like(topk_ids, dtype=torch.bool)
        if groups.random_second:
            sent = second_by_chance(topk_weights.detach(), self.noise_generator)
        capacity = capacity_of(groups.tokens, self.top_k, self.num_experts, groups.capacity_factor)
        fits = within_capacity(topk_ids, sent, groups.tokens, capacity, self.num_experts)
        self.overflow_share = 1.0 - (fits.sum() / sent.sum()).item()
        return topk_weights * fits


def use_training_gates(
    model: MixtralForCausalLM, gating: GatingSettings, noise_generator: torch.Generator
) -> list[TrainingGate]:
    """Replace each layer's gate by a TrainingGate of the same weight; return the gates in order."""
    gates = []
    for layer in model.model.layers:
        gate = TrainingGate(model.config, gating, noise_generator)
        gate.weight = layer.mlp.gate.weight
        layer.mlp.gate = gate
        gates.append(gate)
    return gates


def use_serving_gates(model: MixtralForCausalLM) -> None:
    """Replace each layer's gate by Mixtral's own of the same weight; drop the noise weights."""
    for layer in model.model.layers:
        gate = MixtralTopKRouter(model.config)
        gate.weight = layer.mlp.gate.weight
        layer.mlp.gate = gate


def capacity_of(group_tokens: int, num_chosen: int, num_experts: int, factor: float) -> int:
    """Return how many tokens of a group an expert takes: `factor` times an equal share."""
    return max(1, math.ceil(factor * group_tokens * num_chosen / num_experts))


def second_by_chance(topk_weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return which choices are sent, bool [T, 2]: the second with probability min(1, 2 g2).

    `topk_weights` [T, 2] sum to 1 a row, the larger first. A second expert of small weight seldom
    justifies its share of the capacity.
    """
    drawn = torch.rand(len(topk_weights), generator=generator)
    sent = torch.ones_like(topk_weights, dtype=torch.bool)
    sent[:, 1] = drawn < 2 * topk_weights[:, 1]
    return sent


def within_capacity(
    topk_ids: torch.Tensor, sent: torch.Tensor, group_tokens: int, capacity: int, num_experts: int
) -> torch.Tensor:
    """Return which `sent` choices the experts' capacity admits, bool [T, k]; T is a multiple of S.

    Each `group_tokens` tokens in a row are a group. In a group, all first choices come before all
    second choices, both in the order of the tokens. An expert takes the first `capacity` of its
    choices.
    """
    k = topk_ids.shape[1]

    def by_rank(choices: torch.Tensor) -> torch.Tensor:
        return choices.view(-1, group_tokens, k).transpose(1, 2).reshape(-1, k * group_tokens)

    choices = torch.nn.functional.one_hot(by_rank(topk_ids), num_experts)  # [G, kS, E]
    choices = choices * by_rank(sent).unsqueeze(-1)
    positions = (choices.cumsum(1) * choices).sum(-1)  # in an expert's queue, from 1; 0: not sent
    fits = (positions > 0) & (positions <= capacity)
    return fits.view(-1, k, group_tokens).transpose(1, 2).reshape(-1, k)
