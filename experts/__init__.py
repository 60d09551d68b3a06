"""Expert back ends: checkpoint slices, grouped products, batching and the expert actor."""
