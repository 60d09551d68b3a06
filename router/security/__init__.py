"""Who may use a deployment: the keys of its clients, and where it may listen without any."""
