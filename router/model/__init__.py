"""The dense part of the model: embedding, attention, norms, head."""
