"""The model families, a small file each: names and shapes of tensors, and supported options."""
