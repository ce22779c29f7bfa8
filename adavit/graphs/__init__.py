"""The ONNX graphs of a bundle: stem, blocks, and the dense twin."""
