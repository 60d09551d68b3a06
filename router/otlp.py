"""The old import path of deployment files, for one release: ``router.observability.otlp``."""

from router.observability.otlp import span_processors as span_processors
