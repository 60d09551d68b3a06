"""Which actors are dead, silent, slow or suspect."""
