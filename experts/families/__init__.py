"""The model families, one file each: names and shapes of tensors, and supported options."""
