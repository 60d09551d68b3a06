"""From a served folder to a served folder: calibration, importance, pruning, merging, cards."""
