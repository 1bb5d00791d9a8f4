"""Tuning measures, changes no number, keeps to its budget, and is told by the artifact."""

import pytest
import torch
from families.configs import build

import graphwright
from graphwright import registry
from graphwright.backend import tuned
from graphwright.backends.tvm import tuning
from graphwright.errors import BackendError
from graphwright.kernels.tir import amx
from graphwright.kernels.tir.isa import choose
from graphwright.kernels.tir.linear import Linear, Schedule
from graphwright.kernels.tir.quantized_linear import code_row
from graphwright.target import Target

HOST = Target.parse("cpu")


@pytest.fixture(scope="module")
def compiled():
    return graphwright.compile(build("llama"), "int4-dynamic", tune=5.0)


def test_a_tuned_program_computes_the_same(compiled):
    ids = torch.randint(0, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    plain = graphwright.compile(build("llama"), "int4-dynamic")
    assert torch.equal(compiled.logits(ids), plain.logits(ids))


def test_what_was_found_is_in_the_artifact(compiled, tmp_path):
    compiled.save(tmp_path / "tuned")
    loaded = graphwright.load(tmp_path / "tuned")
    backend = registry.backend("tvm")
    rows = backend.kernels(loaded.folder / "kernels")
    assert rows
    assert all(row["ms"] <= row["default ms"] for row in rows)
    found = tuning.load(loaded.folder / "kernels")
    work = [one.calls * one.layer.outputs * one.layer.inputs for one in found]
    assert work == sorted(work, reverse=True), "the most work comes first"


def test_layers_beyond_the_budget_keep_the_default(compiled, tmp_path):
    assert tuning.tune(compiled.program, HOST, 0.0, lambda _text, _fraction: None) == []
    with pytest.raises(BackendError, match="default schedules"):
        registry.backend("tvm").kernels(tmp_path)


def test_a_faster_candidate_wins_and_a_slower_one_does_not(monkeypatch):
    layer = Linear(64, 64, "int4", 32, True, "float16", code_group=32)
    best = Schedule(rows_per_task=256)

    def measured(_layer, _isa, _target, candidates):
        return {schedule: 1.0 if schedule == best else 2.0 for schedule in candidates}

    monkeypatch.setattr(tuning, "_measure", measured)
    monkeypatch.setattr(tuning, "integer_layers", lambda _program, _target: [(layer, 3)])
    (found,) = tuning.tune(None, HOST, 60.0, lambda _text, _fraction: None)
    assert found == tuning.Tuned(layer, 3, best, 1.0, 2.0)


def test_choices_that_make_no_difference_are_left_out():
    tiles, vectors = (choose(["avx512bw", "avx512_vnni", *more]) for more in (["amx_int8", "amx_bf16"], []))
    long, short = Linear(64, 64, "int8", 64), Linear(64, 64, "int8", 8)
    assert amx.depth(code_row(short).group_size) == 0
    offered = [len(list(tuning.steps(*case))) for case in ((long, tiles), (short, tiles), (long, vectors))]
    assert offered == [3, 2, 2]


def test_a_backend_without_schedules_refuses_to_be_tuned():
    with pytest.raises(BackendError, match="Backend inductor has no schedules to tune"):
        tuned(registry.backend("inductor"), 1.0)
    assert tuned(registry.backend("inductor"), 0.0) is registry.backend("inductor")
