"""Making and changing ONNX graphs."""
