"""The mutation check: which small faults in core files the unit tests find."""
