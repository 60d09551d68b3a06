"""Training of the bundled mixtures in ``deploy/models``."""
