"""Converts traced JAX functions to ONNX; needs the package `onnx` (extra `onnx`)."""
