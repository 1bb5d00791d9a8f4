"""Checkpoints whose weights are quantized already: their own codes become the packed form, bit for bit.

    reading.py              a model of a directory or file, with notes on how it was read
    packed.py               the packed weight, and the modules that multiply with it
    experts.py              the same for the experts of a mixture, stacked
    words.py                integers packed into 32-bit words
    layer.py                the tensors of one layer, checked
    gptq.py, awq.py, compressed_tensors.py, gguf.py
                            one format each: which layers it holds in codes, and what the codes stand for
    directory.py            safetensors of a Hugging Face directory, and the method that its config.json names
    names.py                what it calls the weights of a model that transformers builds with other names
    skeleton.py             a model without weights, filled from a checkpoint

A model is built without weights; every linear layer and embedding that the checkpoint holds in codes is replaced by
a module that calls `quantized_linear` or `quantized_embedding` on them, and experts by one that calls
`quantized_experts`, so that capture meets the codes, and no floating-point copy of a quantized weight is ever made.
"""
