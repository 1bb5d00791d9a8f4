"""AWQ directories: the interleaved order of columns, and what is refused."""

import pytest
import torch
from families.configs import build
from interchange.making import Made, layers, logits, make, packed_rows, with_dense, write

from graphwright.errors import SourceError
from graphwright.numerics import relative_error
from graphwright.sources import open_model

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(values: torch.Tensor) -> torch.Tensor:
    """[M, N] packed along N, with the columns of every eight in AutoAWQ's order."""
    return packed_rows(values[:, [8 * (n // 8) + ORDER[n % 8] for n in range(values.shape[1])]], 4)


def tensors(made: Made) -> dict[str, torch.Tensor]:
    return {"qweight": interleaved(made.codes.t()), "qzeros": interleaved(made.zero.t()), "scales": made.scale.t()}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_codes_stand_for_the_same_weights(tmp_path, family):
    model = build(family)
    made = {name: make(tuple(m.weight.shape), 4, 32, seed) for seed, (name, m) in enumerate(layers(model).items())}
    write(tmp_path, model, {name: tensors(layer) for name, layer in made.items()}, CONFIG)
    reference = with_dense(model, made)
    assert relative_error(logits(open_model(tmp_path, keep_codes=True).model), logits(reference)) < 1e-5
    floats = open_model(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, floats[name]) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize(
    ("config", "problem"), [({"bits": 8}, "AWQ weights of 8 bits"), ({"version": "gemv"}, "laid out for gemv")]
)
def test_what_is_not_read_is_refused(tmp_path, config, problem):
    write(tmp_path, build("llama"), {}, {**CONFIG, **config})
    with pytest.raises(SourceError, match=problem):
        open_model(tmp_path)


def test_zero_points_of_another_shape_are_named(tmp_path):
    name = "model.layers.0.mlp.down_proj"
    held = tensors(make((64, 96), 4, 32, 0))
    held["qzeros"] = held["qzeros"][:2]
    write(tmp_path, build("llama"), {name: held}, CONFIG)
    with pytest.raises(SourceError, match=rf"{name}.qzeros has the shape \[2, 8\] and should have \[3, 8\]"):
        open_model(tmp_path, keep_codes=True)
