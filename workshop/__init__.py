"""Whole-model work that serves nothing: train, prune, merge, upcycle, convert, evaluate, fit."""
