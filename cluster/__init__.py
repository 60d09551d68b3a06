"""The control plane and the data plane: errors, frames, transports, placement, controller."""
