"""TensorRT engines from the ONNX graphs of a bundle; needs neither torch nor the checkpoint."""
