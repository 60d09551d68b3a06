"""What may be taken at one time by all requests of a gateway together; more is refused."""

from __future__ import annotations

from cluster.errors import OverloadedError

RETRY_AFTER_S = 1.0


class Budget:
    """An amount that requests share; used on the gateway's event loop alone."""

    def __init__(self, limit: int, what: str) -> None:
        """``what`` is how the refusal calls the limit's unit, such as ``requests``."""
        self._limit, self._what = limit, what
        self.taken = 0

    def share(self) -> Share:
        """Return an empty share, which gives back at the end of its ``with`` what it took."""
        return Share(self)

    def _take(self, amount: int) -> None:
        if self.taken + amount > self._limit:
            raise OverloadedError(
                f"the gateway is full: at most {self._limit} {self._what} at one time",
                retry_after_s=RETRY_AFTER_S,
            )
        self.taken += amount


class Share:
    """One request's part of a :class:`Budget`."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._amount = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()

    def take(self, amount: int) -> None:
        """Take more; raises :class:`OverloadedError` with a hint when there is not so much."""
        self._budget._take(amount)
        self._amount += amount

    def give_back(self) -> None:
        """Give back all that was taken; nothing the second time."""
        self._budget.taken -= self._amount
        self._amount = 0
