"""The torch.compile face: found by name, correct with dynamic shapes, breaks, caches and generate; honest errors."""

import pytest
import torch
from families.configs import build
from transformers import StaticCache

from graphwright import dynamo
from graphwright.numerics import mean_kl, relative_error


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(length))


def test_it_is_registered():
    assert "graphwright" in torch._dynamo.list_backends()


@torch.no_grad()
def test_dynamic_shapes_of_a_language_model():
    model = build("llama")
    compiled = torch.compile(model, backend="graphwright", dynamic=True)
    for batch, length in ((2, 8), (3, 5), (1, 11)):
        ids = ids_of(batch, length)
        found = compiled(input_ids=ids, use_cache=False).logits
        assert relative_error(found, model(input_ids=ids, use_cache=False).logits) < 1e-4


@torch.no_grad()
def test_a_recipe_quantizes():
    model = build("llama")
    compiled = torch.compile(model, backend="graphwright", options={"recipe": "int8"})
    ids = ids_of(2, 8)
    found, expected = compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
    assert 0 < mean_kl(found, expected) < 0.05


def test_generate_says_the_same():
    model = build("llama")
    ids = ids_of(1, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    model.forward = torch.compile(model.forward, backend="graphwright", dynamic=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True), expected)


@torch.no_grad()
def test_a_static_cache_is_written_in_place():
    model = build("llama")
    ids = ids_of(1, 6)

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=16)
        outputs = [forward(input_ids=ids[:, :4], past_key_values=cache, use_cache=True).logits]
        outputs += [forward(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in (4, 5)]
        return torch.cat(outputs, 1)

    expected = steps(model)
    compiled = torch.compile(model, backend="graphwright")
    assert relative_error(steps(compiled), expected) < 1e-4


@torch.no_grad()
def test_graph_breaks_are_survived():
    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

        def forward(self, x):
            x = self.one(x).relu()
            torch._dynamo.graph_break()
            return self.two(x)

    model = Breaks()
    compiled = torch.compile(model, backend="graphwright", options={"recipe": "int8"})
    x = torch.randn(5, 8)
    assert relative_error(compiled(x), model(x)) < 0.05


@torch.no_grad()
def test_numbers_that_change_are_followed():
    def scale(x, factor):
        return x * factor

    compiled = torch.compile(scale, backend="graphwright", dynamic=True)
    x = torch.randn(4)
    for factor in (2.0, 3.5, 2.0, -1.25):
        assert torch.equal(compiled(x, factor), x * factor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "int9"}, "Unknown recipe 'int9'"),
        ({"target": "cpuu"}, "Unknown target 'cpuu'. Did you mean cpu"),
        ({"recipee": "int8"}, "Option 'recipee'.*Did you mean recipe"),
    ],
)
def test_wrong_options_are_explained(options, message):
    compiled = torch.compile(torch.nn.Linear(3, 3), backend="graphwright", options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(torch.randn(2, 3))


def test_gradients_are_warned_about():
    compiled = torch.compile(torch.nn.Linear(3, 3), backend="graphwright")
    with pytest.warns(UserWarning, match="no gradient"):
        result = compiled(torch.randn(2, 3))
    assert not result.requires_grad


def test_contract_changing_passes_are_left_out():
    from graphwright.recipe import Recipe

    kept = dynamo._keeping_contract(Recipe.load("int4"))
    assert [p.name for p in kept.passes] == ["merge_linear", "experts", "rtn"]


@torch.no_grad()
def test_a_named_backend_takes_a_part_and_the_rest_is_reported():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)

        def forward(self, x):
            return self.two(self.one(x).relu().cummax(-1).values)

    model = Model()
    compiled = torch.compile(model, backend="graphwright", options={"backend": "tvm"})
    x = torch.randn(5, 16)
    with pytest.warns(UserWarning, match=r"backend tvm leaves \d of \d nodes of this region to inductor: .*cummax"):
        found = compiled(x)
    assert relative_error(found, model(x)) < 1e-5
