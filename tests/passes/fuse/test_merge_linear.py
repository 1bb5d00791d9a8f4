"""Merging sibling linear layers: exact, owned weights only, with and without bias."""

import torch
from families.cache import captured

from graphwright.capture import capture
from graphwright.numerics import relative_error
from graphwright.ops import quantized_linear
from graphwright.pass_ import Context
from graphwright.passes.fuse.merge_linear import MergeLinear
from graphwright.program import Program
from graphwright.target import Target

CONTEXT = Context(Target.parse("cpu"))


class Siblings(torch.nn.Module):
    def __init__(self, bias: bool, tied: bool = False) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 4, bias=bias), torch.nn.Linear(6, 3, bias=bias)
        self.other = torch.nn.Linear(6, 4, bias=not bias)
        if tied:
            self.other.weight = self.one.weight

    def forward(self, x):
        return self.one(x), self.two(x), self.other(x), self.two(x + 1)


def merged(module: torch.nn.Module) -> tuple[Program, Program, int]:
    program = capture(module, {"x": torch.randn(3, 6)})
    before = program.clone()
    result = MergeLinear().run(program, CONTEXT)
    return before, result.program, len(result.sites)


def test_weights_that_something_else_reads_stay():
    before, after, sites = merged(Siblings(bias=True))
    assert sites == 0, "the second layer is read twice, so it has no sibling left"
    assert before.text() == after.text()


def test_siblings_become_one_and_slices():
    class Three(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(6, n) for n in (8, 4, 4))

        def forward(self, x):
            return self.q(x), self.k(x), self.v(x)

    before, after, sites = merged(Three())
    assert sites == 3
    assert after.text() == (
        "%x : float32[batch, 6]\n"
        "%1 = linear(%x, q.weight_merged, q.weight_merged_1) : float32[batch, 16]\n"
        "%2 = slice.Tensor(%1, -1, 0, 8) : float32[batch, 8]\n"
        "%3 = slice.Tensor(%1, -1, 8, 12) : float32[batch, 4]\n"
        "%4 = slice.Tensor(%1, -1, 12, 16) : float32[batch, 4]\n"
        "return [%2, %3, %4]\n"
    )
    x = torch.randn(5, 6)
    for found, expected in zip(after(x=x), before(x=x), strict=True):
        assert relative_error(found, expected) < 1e-6
    assert set(after.weights()) == {"q.weight_merged", "q.weight_merged_1"}, "the old weights are let go of"


def test_bias_and_no_bias_do_not_mix():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.a(x), self.b(x)

    assert merged(Two())[2] == 0


def test_llama_merges_qkv_and_gate_up():
    _, program = captured("llama")
    result = MergeLinear().run(program, CONTEXT)
    assert len(result.sites) == 2 * 5
    assert len(list(result.program.calls(torch.ops.aten.linear.default))) == 2 * 4 + 1


class Packed(torch.nn.Module):
    """Layers in codes that read one input: two alike, one with other groups."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, group) in {"q": (8, 4), "k": (4, 4), "other": (4, 8)}.items():
            self.register_buffer(f"{name}_codes", torch.randint(0, 256, (rows, 4), dtype=torch.uint8))
            self.register_buffer(f"{name}_scale", torch.rand(rows, 8 // group))
            self.register_buffer(f"{name}_zero", torch.randint(0, 16, (rows, 8 // group), dtype=torch.uint8))
        self.groups = {"q": 4, "k": 4, "other": 8}

    def forward(self, x):
        return tuple(self.layer(x, name) for name in self.groups)

    def layer(self, x, name):
        codes, scale, zero = (getattr(self, f"{name}_{part}") for part in ("codes", "scale", "zero"))
        return quantized_linear.target(x, codes, scale, zero, None, "int4", self.groups[name])


def test_siblings_in_codes_become_one_where_their_formats_agree():
    program = capture(Packed(), {"x": torch.randn(3, 8)})
    before = program.clone()
    after = MergeLinear().run(program, CONTEXT).program
    assert after.text() == (
        "%x : float32[batch, 8]\n"
        "%1 = quantized_linear(%x, q_codes_merged, q_codes_merged_1, q_codes_merged_2, None, int4, 4)"
        " : float32[batch, 12]\n"
        "%2 = slice.Tensor(%1, -1, 0, 8) : float32[batch, 8]\n"
        "%3 = slice.Tensor(%1, -1, 8, 12) : float32[batch, 4]\n"
        "%4 = quantized_linear(%x, other_codes, other_scale, other_zero, None, int4, 8) : float32[batch, 4]\n"
        "return [%2, %3, %4]\n"
    )
    x = torch.randn(5, 8)
    for found, expected in zip(after(x=x), before(x=x), strict=True):
        assert relative_error(found, expected) < 1e-6
