"""One MoE layer: choose, dispatch, combine."""
