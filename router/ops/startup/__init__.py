"""What the start of `serve run` checks, tells and cleans up."""
