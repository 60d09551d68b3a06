"""Fitted mixtures as folders that are served."""
