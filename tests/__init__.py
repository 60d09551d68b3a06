"""All tests. Their threads of OpenMP wait without spinning.

By default a waiting thread keeps its core for milliseconds. Beside any other work on two cores,
each small product of torch then takes that long.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # is read when torch is imported
