"""What keys have used, from the samples of all gateways."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from cluster.reports import KeyUsage, Measurements, Samples, UsageReport
from router.observability import catalogue

_FIELDS = {"prompt": "prompt_tokens", "generated": "generated_tokens", "rows": "rows"}
"""The field of :class:`KeyUsage` for each kind of :data:`catalogue.KEY_TOKENS`."""


def usage_of(measurements: Measurements) -> UsageReport:
    """Return what the keys of each name have used, summed over all gateways that run."""
    gateways = [process for process in measurements.processes if process.kind == "gateway"]
    sums: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for gateway in gateways:
        for name, field, value in _counts(gateway.samples):
            sums[name][field] += value
    fields = list(KeyUsage.__slots__)[1:]
    keys = (
        KeyUsage(name, **{field: used[field] for field in fields})
        for name, used in sorted(sums.items())
    )
    return UsageReport(len(gateways), tuple(keys))


def _counts(samples: Samples) -> Iterator[tuple[str, str, int]]:
    """Yield a name, a field of :class:`KeyUsage` and a value for each count of one gateway."""
    for _, labels, value in samples.families.get(catalogue.KEY_REQUESTS.name, ()):
        yield labels["key_name"], "requests", int(value)
    for _, labels, value in samples.families.get(catalogue.KEY_TOKENS.name, ()):
        yield labels["key_name"], _FIELDS[labels["kind"]], int(value)
    for _, labels, value in samples.families.get(catalogue.KEY_REFUSALS.name, ()):
        yield labels["key_name"], "refused", int(value)
