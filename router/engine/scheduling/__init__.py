"""Which sequences wait, which run, and which tokens the next step computes."""
