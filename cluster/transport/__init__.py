"""The transports of frames to expert actors: streams and Ray calls."""
