"""Changes of ONNX graphs."""
