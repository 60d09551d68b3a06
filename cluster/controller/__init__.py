"""The controller: it keeps every expert on a living actor."""
