"""Bringing a model in another layout to the safetensors layout that is served.

A layout (``huggingface.py``, ``mistral.py``, ``gguf_file.py``) reads a configuration and tells for
each tensor of the model where the source has it; ``plan.py`` checks that against the family before
a byte is written, and ``write.py`` writes the shards. A family is added to a layout by a line in
that layout's table.
"""
