"""Control plane and wire: configuration, errors, frames, transports, placement, controller."""
