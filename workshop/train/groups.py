"""GShard's controls of the gate in training: groups, capacity, and a random second expert.

After Lepikhin et al. 2020, "GShard" (arXiv 2006.16668), section 2.2 and algorithm 1.
G: groups, S: tokens of a group, E: experts, k: experts per token, T = G * S tokens.
"""

import math

import torch


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
