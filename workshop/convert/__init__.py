"""The conversion of a model from another layout to the safetensors layout that is served.

A layout (``huggingface.py``, ``mistral.py``, ``gguf_file.py``) reads the configuration and finds
each tensor of the model in the source. ``plan.py`` checks the tensors against the family before a
byte is written, and ``write.py`` writes the shards. Each layout has a table of its families.
"""
