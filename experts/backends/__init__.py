"""Loaded experts of mixtures: torch architectures, scikit-learn estimators, ONNX models."""
