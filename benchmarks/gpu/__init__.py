"""One command for a machine with an accelerator: parity, speed, memory and faults on it."""
