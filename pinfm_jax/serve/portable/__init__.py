"""A ranker for runtimes that are not JAX: ONNX and TensorFlow SavedModel."""
