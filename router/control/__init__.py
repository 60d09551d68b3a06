"""What a replica knows of the controller: its placement and its state."""
