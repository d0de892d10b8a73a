"""An ONNX model at work: session, scheduler, batching, response cache."""
