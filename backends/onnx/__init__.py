"""ONNX: the rewritten program as one model that other runtimes serve; see `exporter`."""
