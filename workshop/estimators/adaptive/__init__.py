"""The adaptive mixtures of local experts of Jacobs, Jordan, Nowlan and Hinton (1991)."""
