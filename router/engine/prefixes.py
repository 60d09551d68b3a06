"""Which pages the sequences of a router share, and what they compute because of it.

A sequence enters its full pages as it computes them, and takes others' pages in the place of its
own: when it is admitted, and before each step, so that of requests that come together one computes
what all begin with. At least its last token is computed, since its logits are wanted. So the page
that a sequence writes is always its own, and no page is ever copied.

Where a model ``is_independent`` (:class:`router.model.model.MoEModel`) and native code computes its
experts, keys and values depend on the tokens so far and the weights alone, bit for bit. Elsewhere
nothing is shared. Expert actors of several kernel classes give other bits with a shared page or
without.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import ExpertMeshError, NotFiniteError, PoisonedRequestError
from router.engine.sequence import Sequence
from router.messages.prefixes import prefix_keys, prefix_root
from router.model.prefix_cache import PrefixCache

_UNSOUND = NotFiniteError, PoisonedRequestError
"""The errors of sequences whose keys and values are not to be trusted."""
_NO_PERIOD = -1
"""The period of a sequence that never enters a page."""


def why_dependent(is_independent: bool, has_limit: bool) -> str:
    """Return why keys and values depend on more than tokens and weights; empty where they do not.

    ``is_independent`` is that of :class:`router.model.model.MoEModel`. ``has_limit`` says that
    experts take a bounded number of a step's tokens.
    """
    if not is_independent:
        return "its steps give other bits for other batches"
    if has_limit:
        return "with expert_capacity a token's experts depend on its batch"
    return ""


class Prefixes:
    """Shares the pages of a :class:`PrefixCache` among sequences; for the engine's thread alone.

    ``looked_up_tokens`` counts the prompt tokens of admitted sequences, ``hit_tokens`` those that
    other sequences' pages had. Any thread may read them.
    """

    def __init__(self, cache: PrefixCache, identity: str) -> None:
        """``identity`` is that of the model, without whose equal no page is found."""
        self._cache = cache
        self._identity = identity
        self._page_size = cache.page_size
        self.looked_up_tokens = 0
        self.hit_tokens = 0
        self._generations: Mapping[str, int] = {}
        self._period = 0
        """The number of times that all pages were forgotten."""
        self._has_others = False

    def look(self, generations: Mapping[str, int], has_others: bool) -> None:
        """Forget all pages where an expert actor is gone or replaced: its device may have lied.

        So it is where experts begin to be computed by other than native code, which ``has_others``
        says: then nothing is shared. ``generations`` are those of the placement. Sequences that run
        enter no page any more, since their pages follow from earlier ones.
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
        """Give a sequence that is admitted its pages, shared ones first."""
        request, tokens = sequence.request, sequence.token_ids
        most = len(tokens) - 1
        received = request.prompt_logprobs_of(sequence.index)
        if received < request.num_prompt_logprobs:
            most = min(most, received)
        sequence.prefix_period = self._period
        if request.routed is not None:
            most = min(most, request.num_routed_of(sequence.index))
        # The keys and values of forced experts follow from these too.
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
        """Enter the pages that a sequence has filled; skip what others have computed meanwhile."""
        num_full = sequence.num_computed // self._page_size
        if num_full > sequence.num_entered:
            self._enter(sequence, num_full)
        if num_full < sequence.most_shared and not sequence.awaited and sequence.deaths is None:
            self._take_over(sequence, num_full)

    def release(self, sequence: Sequence, error: ExpertMeshError | None) -> None:
        """Take the pages of a sequence that ends; after some errors none of them is found again."""
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
        """Put known pages in the place of a sequence's own, from its page ``first`` on."""
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
        """Count the tokens of a sequence's first pages as computed."""
        before, end = sequence.num_computed, num_pages * self._page_size
        if end <= before:
            return
        num_prompt = len(sequence.request.prompt_token_ids)
        sequence.num_computed = end
        num_hit = min(end, num_prompt) - min(before, num_prompt)
        sequence.num_cached += num_hit
        self.hit_tokens += num_hit
