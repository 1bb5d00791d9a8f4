"""Which part of a graph is shown, found by dataflow alone."""

import networkx
import pytest
from families.configs import build
from report.made import llama, mlp

from graphwright.capture import capture
from graphwright.report.layer import choose, dataflow
from graphwright.text import op_name


def names(program):
    return [op_name(node.target).partition(".")[0] for node in choose(program).nodes]


def test_one_whole_layer_before():
    found = choose(llama()[0])
    ops = names(llama()[0])
    assert found.title == "Layer 3 of 3"
    assert ops.count("scaled_dot_product_attention") == 1
    assert ops.count("linear") == 7
    assert ops.count("silu") == 1
    assert ops.count("rsqrt") == 2
    assert ops[-1] == "add"
    assert op_name(found.start.target) == "add.Tensor"


def test_one_whole_layer_after_with_its_cache_writes():
    ops = names(llama()[1])
    assert ops.count("attention") == 1
    assert ops.count("quantized_linear") == 4
    assert ops.count("rms_norm") == 2
    assert ops.count("rope") == 2
    assert ops.count("kv_cache_update") == 2
    assert ops.count("gated_activation") == 1


def test_only_the_start_comes_in_from_earlier_layers():
    program = llama()[0]
    found = choose(program)
    graph = dataflow(program)
    inside = set(found.nodes)
    embedding = next(node for node in program.calls() if op_name(node.target) == "embedding")
    outside = {s for node in inside for s in graph.predecessors(node) if s not in inside}
    assert {node for node in outside if networkx.has_path(graph, embedding, node)} == {found.start}


@pytest.mark.parametrize("layers", [2, 4])
def test_every_depth_shows_an_equal_layer(layers):
    assert sorted(names(llama(layers)[0])) == sorted(names(llama()[0]))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "bert"])
def test_other_residual_streams(family):
    program = capture(build(family))
    found = choose(program)
    assert found.start is not None
    ops = names(program)
    assert ops.count("scaled_dot_product_attention") + ops.count("softmax") == 1


def test_renaming_changes_nothing():
    program = llama()[0].clone()
    for index, node in enumerate(program.graph.nodes):
        node.name = f"n{index}"
    assert names(program) == names(llama()[0])


def test_a_small_plain_graph_is_whole():
    program = mlp(4)
    assert choose(program).nodes == list(program.calls())
    assert "whole graph" in choose(program).title


def test_a_large_plain_graph_shows_one_repetition():
    assert names(mlp(50)) in (
        ["linear", "gelu", "layer_norm"],
        ["gelu", "layer_norm", "linear"],
        ["layer_norm", "linear", "gelu"],
    )
