"""The engine: tokens in, tokens out, over any compiled causal program with caches.

`tokenizer` reads text, `prompts` makes one batch of whatever was asked, `sampling` chooses tokens, and `generate` runs
prefill and decode.
"""
