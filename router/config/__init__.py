"""The sections of a deployment file, read and checked."""
