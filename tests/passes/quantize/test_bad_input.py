"""What calibrated methods do with bad data: dead and constant channels, NaN, none at all, too few; and interruptions."""

import pytest
import torch
from passes.quantize.quantizing import CPU, correlated

from graphwright.capture import capture
from graphwright.errors import PassError
from graphwright.manager import PassManager, plan_passes
from graphwright.pass_ import Context
from graphwright.passes.quantize import awq, smoothquant
from graphwright.program import Program
from graphwright.recipe import Recipe

KEPT = {"head_bits": 0, "embedding_bits": 0}
EIGHT = {"rtn": {**KEPT, "bits": 8, "group_size": 0}}
CALIBRATED = {
    "gptq": [{"gptq": KEPT}],
    "spqr": [{"spqr": KEPT}],
    "awq": [{"awq": KEPT}],
    "smoothquant": ["smoothquant", EIGHT],
    "llm_int8": ["llm_int8"],
    "static": [EIGHT, {"activations": {"static": True}}],
    "mixed": [{"rtn": {**KEPT, "mixed_bits": 6.0}}],
}


class Block(torch.nn.Module):
    """A norm and two layers, so that there is something to fold scales into."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x)))) + x


def data(rows: int = 96) -> dict[str, torch.Tensor]:
    return {"x": correlated(rows, 64)}


def block() -> Program:
    return capture(Block(), data(8))


def rewrite(passes: list, program: Program, calibration: list, **context) -> Program:
    made = Context(CPU, calibration=calibration, **context)
    return PassManager(made).run(program, plan_passes(Recipe.load({"passes": passes}), program))


@pytest.mark.parametrize("passes", CALIBRATED.values(), ids=CALIBRATED)
def test_dead_and_constant_channels_are_no_obstacle(passes):
    model = Block()
    with torch.no_grad():
        # Behind these, channel 3 of the norm is always 0 and channel 9 always 2; up never fires in row 5.
        model.norm.weight[3] = model.norm.bias[3] = model.norm.weight[9] = 0.0
        model.norm.bias[9], model.up.bias[5] = 2.0, -100.0
    program = capture(model, data(8))
    after = rewrite(passes, program, [data()])
    (expected,), (actual,) = program(**data()), after(**data())
    assert actual.isfinite().all()
    assert (actual - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("passes", CALIBRATED.values(), ids=CALIBRATED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_name_the_layer(passes, value):
    bad = data()
    bad["x"][17, 4] = value
    with pytest.raises(PassError, match=r"activations that are NaN or infinite.*sample 1"):
        rewrite(passes, block(), [data(), bad])


@pytest.mark.parametrize("passes", CALIBRATED.values(), ids=CALIBRATED)
def test_data_is_asked_for_where_random_tokens_cannot_stand_in(passes):
    with pytest.raises(PassError, match="there are no calibration inputs"):
        rewrite(passes, block(), [])


@pytest.mark.parametrize("method", ["gptq", "spqr"])
def test_one_token_of_calibration_is_a_singular_hessian_and_still_works(method):
    program = block()
    after = rewrite([{method: KEPT}], program, [data(1)])
    (expected,), (actual,) = program(**data()), after(**data())
    assert (actual - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("method", ["gptq", "spqr"])
def test_a_hessian_that_no_damping_helps_names_the_layer(method):
    huge = {"x": torch.full((8, 64), 0.0)}
    program = block()
    program.weights()["norm.bias"].fill_(3e19)
    with pytest.raises(PassError, match=r"(Hessian is not positive definite|NaN or infinite).*up\.weight"):
        rewrite([{method: KEPT}], program, [huge])


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("passes", "cls"), [(CALIBRATED["awq"], awq.Awq), (CALIBRATED["smoothquant"], smoothquant.Smoothquant)]
)
def test_an_interrupted_search_loses_the_current_tensor_only(passes, cls, tmp_path, monkeypatch):
    program, calls, search = block(), [], cls._scale
    whole = rewrite(passes, program, [data()])

    def counting(self, *args):
        calls.append("")
        if len(calls) == 2:
            raise Stopped
        return search(self, *args)

    monkeypatch.setattr(cls, "_scale", counting)
    with pytest.raises(PassError, match="Stopped"):
        rewrite(passes, program, [data()], checkpoint=tmp_path)
    after = rewrite(passes, program, [data()], checkpoint=tmp_path)
    assert len(calls) == 3, "the first tensor is not searched again"
    assert all(torch.equal(a, b) for a, b in zip(whole.weights().values(), after.weights().values(), strict=True))


@pytest.mark.parametrize("name", ["llm_int8", "static", "mixed"])
def test_finished_measurements_are_read_back(name, tmp_path):
    program = block()
    first = rewrite(CALIBRATED[name], program, [data()], checkpoint=tmp_path)
    kept = list(tmp_path.rglob("measured*.safetensors"))
    assert len(kept) == 2
    kept[0].unlink()
    again = rewrite(CALIBRATED[name], program, [data()], checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.weights().values(), again.weights().values(), strict=True))


def test_a_damaged_checkpoint_is_named(tmp_path):
    program = block()
    rewrite(CALIBRATED["gptq"], program, [data()], checkpoint=tmp_path)
    next(tmp_path.rglob("up.weight.safetensors")).write_bytes(b"cut")
    with pytest.raises(PassError, match=r"up\.weight\.safetensors cannot be read"):
        rewrite(CALIBRATED["gptq"], program, [data()], checkpoint=tmp_path)
