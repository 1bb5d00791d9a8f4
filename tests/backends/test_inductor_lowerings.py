"""Every lowering computes what its op's reference computes, on the op's samples, without compiling anything."""

import pytest
import torch

import graphwright.ops  # noqa: F401
from graphwright.backends.inductor.lowerings import lowering
from graphwright.numerics import relative_error
from graphwright.op import OPS

CASES = [
    pytest.param(name, form, index, id=f"{name}-{form}-{index}")
    for name in ("attention", "rope", "quantized_linear", "quantized_embedding", "kv_cache_update")
    for form in ("general", "decode")
    for index in range(len(list(OPS[name].samples_of(torch.float32))))
]


@pytest.mark.parametrize(("name", "form", "index"), CASES)
@torch.no_grad()
def test_lowerings_equal_references(name, form, index):
    torch.manual_seed(0)
    sample = list(OPS[name].samples_of(torch.float32))[index]
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
    if name == "attention" and form == "decode":
        # One query per sequence: the last one, at its own position.
        last = args[0].shape[2] - 1
        positions = args[3] if args[3] is not None else torch.arange(args[0].shape[2])[None]
        args[0], args[3] = args[0][:, :, last:], positions[:, last:]
        if args[5] is not None:
            args[5] = args[5][:, :, last:]
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = OPS[name].reference(*args, **sample.kwargs)
    found = lowering(OPS[name].target, form)(*copies, **sample.kwargs)
    if name == "kv_cache_update":
        assert torch.equal(copies[0][:, :, :-1], args[0][:, :, :-1]), sample.note
        return
    if name == "attention" and args[3] is not None:
        seen = args[3] >= 0
        found, expected = (x.transpose(1, 2)[seen.expand(x.shape[0], -1)] for x in (found, expected))
    assert relative_error(found, expected) < 1e-4, sample.note
