"""The whole cluster in one process, under virtual time and a seeded schedule of faults."""
