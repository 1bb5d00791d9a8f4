"""compressed-tensors: Hugging Face directories of quantized weights for `transformers` and vLLM; see `exporter`."""
