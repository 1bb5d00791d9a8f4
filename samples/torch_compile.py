"""Face one: Graphwright as a backend of torch.compile, under the model's own `generate`.

python samples/torch_compile.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[1, 5, 9, 2]])

expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
model.forward = torch.compile(model.forward, backend="graphwright", dynamic=True)
found = model.generate(prompt, max_new_tokens=8, do_sample=False)

print("eager   ", expected[0].tolist())
print("compiled", found[0].tolist())
if not torch.equal(expected, found):
    raise SystemExit("the compiled model generates other tokens")
