"""Which pages a router's sequences share, and which tokens they need not compute as a result.

A sequence registers its full pages as it computes them. It replaces its own pages with others' on
admission and before each step, so of requests that arrive together only one computes their common
prefix. Its last token is always computed, since its logits are needed. So a sequence writes only
to a page of its own, and no page is ever copied.

If a model ``is_independent`` (:class:`router.model.model.MoEModel`) and native code computes its
experts, keys and values depend, bit for bit, only on the tokens so far and the weights. Otherwise
nothing is shared: expert actors of several kernel classes give different bits with and without a
shared page.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ExpertMeshError, NotFiniteError, PoisonedRequestError
from router.engine.sequence import Sequence
from router.messages.prefixes import prefix_keys, prefix_root
from router.model.page_pool import PrefixCache

_UNSOUND = NotFiniteError, PoisonedRequestError
"""The errors of sequences whose keys and values cannot be trusted."""
_NO_PERIOD = -1
"""The period of a sequence that never registers a page."""


def why_dependent(is_independent: bool, has_limit: bool) -> str:
    """Return why keys and values depend on more than tokens and weights; empty if they do not.

    ``is_independent`` comes from :class:`router.model.model.MoEModel`. ``has_limit`` says that
    experts take a bounded number of a step's tokens.
    """
    if not is_independent:
        return "its results depend, in their last bits, on the batch"
    if has_limit:
        return "with expert_capacity set, a token's experts depend on its batch"
    return ""


class Prefixes:
    """Shares the pages of a :class:`PrefixCache` among sequences; only for the engine's thread.

    ``looked_up_tokens`` counts the prompt tokens of admitted sequences, ``hit_tokens`` the ones
    found in other sequences' pages. Any thread may read both.
    """

    def __init__(self, cache: PrefixCache, identity: str) -> None:
        """``identity`` is the model's; only pages of the same identity are found."""
        self._cache = cache
        self._identity = identity
        self._page_size = cache.page_size
        self.looked_up_tokens = 0
        self.hit_tokens = 0
        self._generations: Mapping[str, int] = {}
        self._period = 0
        """How many times all pages were forgotten."""
        self._has_others = False

    def look(self, generations: Mapping[str, int], has_others: bool) -> None:
        """Forget all pages if an expert actor is gone or replaced: its device may have been wrong.

        The same happens when experts start to run without native code (``has_others``): then
        nothing is shared. ``generations`` are the placement's. Running sequences register no more
        pages, since their pages follow from earlier ones.
        """
        before, self._generations = self._generations, generations
        begins, self._has_others = has_others > self._has_others, has_others
        is_gone = generations is not before and any(
            generations.get(actor_id) != number for actor_id, number in before.items()
        )
        if begins or is_gone:
            self._cache.forget_all()
            self._period += 1

    def occupy(self, sequence: Sequence, num_pages: int) -> None:
        """Give an admitted sequence its pages, shared ones first."""
        request, tokens = sequence.request, sequence.token_ids
        most = len(tokens) - 1
        received = request.prompt_logprobs_of(sequence.index)
        if received < request.num_prompt_logprobs:
            most = min(most, received)
        sequence.prefix_period = self._period
        if request.routed is not None:
            most = min(most, request.num_routed_of(sequence.index))
        # With forced experts, keys and values depend on these experts too.
        if self._has_others or (request.routed is not None and request.routed.forced):
            most, sequence.prefix_period = 0, _NO_PERIOD
        root = prefix_root(self._identity, request.tenant, request.cache_salt)
        most -= most % self._page_size
        sequence.prefix_keys = [root, *prefix_keys(root, tokens[:most], self._page_size)]
        sequence.most_shared = most // self._page_size
        shared = self._cache.share(sequence.prefix_keys[1:])
        own = self._cache.take(num_pages - len(shared))
        sequence.occupy([*shared, *own], self._page_size)
        if not self._has_others:
            self.looked_up_tokens += len(request.prompt_token_ids)
        self._skip(sequence, len(shared))

    def update(self, sequence: Sequence) -> None:
        """Register the pages that a sequence has filled; skip pages that others have computed."""
        num_full = sequence.num_computed // self._page_size
        if num_full > sequence.num_entered:
            self._enter(sequence, num_full)
        if num_full < sequence.most_shared and not sequence.awaited and sequence.deaths is None:
            self._take_over(sequence, num_full)

    def release(self, sequence: Sequence, error: ExpertMeshError | None) -> None:
        """Free the pages of a sequence that ends; after some errors none is shared again."""
        if isinstance(error, _UNSOUND):
            self._cache.forget(sequence.pages)
        elif sequence.pages:
            self._enter(sequence, sequence.num_computed // self._page_size)
        self._cache.give_back(sequence.pages)
        sequence.pages = []

    def _enter(self, sequence: Sequence, num_full: int) -> None:
        if not sequence.exact or sequence.prefix_period != self._period:
            return
        keys, size = sequence.prefix_keys, self._page_size
        more = sequence.token_ids[(len(keys) - 1) * size : num_full * size]
        keys += prefix_keys(keys[-1], more, size)
        for index in range(sequence.num_entered, num_full):
            self._cache.enter(sequence.pages[index], keys[index + 1])
        sequence.num_entered = num_full

    def _take_over(self, sequence: Sequence, first: int) -> None:
        """Replace a sequence's own pages with known ones, from its page ``first`` on."""
        keys = sequence.prefix_keys[1 + first : 1 + sequence.most_shared]
        shared = self._cache.share(keys)
        if not shared:
            return
        end = first + len(shared)
        replaced = sequence.pages[first:end]
        pages = [*sequence.pages[:first], *shared, *sequence.pages[end:]]
        sequence.occupy(pages, self._page_size)
        self._cache.give_back(replaced)
        self._skip(sequence, end)

    def _skip(self, sequence: Sequence, num_pages: int) -> None:
        """Count the tokens in a sequence's first pages as computed."""
        before, end = sequence.num_computed, num_pages * self._page_size
        if end <= before:
            return
        num_prompt = len(sequence.request.prompt_token_ids)
        sequence.num_computed = end
        num_hit = min(end, num_prompt) - min(before, num_prompt)
        sequence.num_cached += num_hit
        self.hit_tokens += num_hit
