"""Mixtures of anything: experts of scikit-learn, torch and ONNX behind a gate."""
