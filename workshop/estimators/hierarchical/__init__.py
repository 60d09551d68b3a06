"""The hierarchical mixtures of experts of Jordan and Jacobs (1994), fitted by EM."""
