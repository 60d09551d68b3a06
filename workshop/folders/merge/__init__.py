"""Merging the experts of a model into fewer, or into one."""
