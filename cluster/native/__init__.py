"""Native code of the data plane, in C; optional."""
