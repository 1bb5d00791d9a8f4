"""Layouts: nothing overlaps, arrows go down, every box is there."""

import itertools

import pytest
from report.made import llama, llama_report, mlp

from graphwright.report.layer import Selection
from graphwright.report.picture import layout, short_shape
from graphwright.report.subgraph import draw


def picture_of(name):
    if name in ("before", "after"):
        return llama_report().pictures[name]
    program = llama()[0] if name == "whole" else mlp(2)
    return draw(program, Selection(list(program.calls()), ""), program.contract.sizes())


@pytest.mark.parametrize("name", ["before", "after", "whole", "plain"])
def test_no_overlaps_and_only_downward_arrows(name):
    picture = picture_of(name)
    placed = layout(picture)
    assert {box.node["id"] for box in placed.boxes} == {node["id"] for node in picture["nodes"]}
    for one, other in itertools.combinations(placed.boxes, 2):
        apart_x = one.x + one.width <= other.x + 0.01 or other.x + other.width <= one.x + 0.01
        apart_y = one.y + one.height <= other.y + 0.01 or other.y + other.height <= one.y + 0.01
        assert apart_x or apart_y, (one.label, other.label)
    boxes = {box.node["id"]: box for box in placed.boxes}
    for arrow in placed.arrows:
        assert boxes[arrow.source].y + boxes[arrow.source].height <= boxes[arrow.target].y
    for box in placed.boxes:
        assert box.x >= 0
        assert box.y >= 0
        assert box.x + box.width <= placed.width
        assert box.y + box.height <= placed.height


def test_the_same_picture_gives_the_same_layout():
    picture = llama_report().pictures["after"]
    assert layout(picture) == layout(picture)


def test_an_empty_picture_has_no_size():
    assert layout({"title": "", "sizes": {}, "nodes": [], "edges": []}).boxes == ()


def test_boxes_say_what_they_are():
    nodes = llama_report().pictures["after"]["nodes"]
    attention = next(node for node in nodes if node["label"] == "attention")
    assert attention["kind"] == "semantic"
    assert attention["origin"] == "static_cache"
    assert attention["shape"] == "float32[batch, 4, sequence, 16]"
    assert attention["flops"] > 0
    weight = next(node for node in nodes if "o_proj.weight_int4" in node["text"])
    assert weight["kind"] == "weight"
    assert "weight_scale" in weight["text"]
    assert "weight_zero_point" in weight["text"]
    assert weight["cost_bytes"] == 64 * 32 + 64 * 2 * 2 + 64 * 2
    assert sum(node["label"] == "from the layer before" for node in nodes) == 1


def test_a_write_is_before_the_read_it_feeds():
    picture = llama_report().pictures["after"]
    labels = {node["id"]: node["label"] for node in picture["nodes"]}
    order = [(labels[e["source"]], labels[e["target"]]) for e in picture["edges"] if e["kind"] == "order"]
    assert order == [("kv_cache_update", "slice")] * 2


def test_short_shapes():
    assert short_shape("float32[batch, 4, sequence, 16]") == "f32 [B, 4, S, 16]"
    assert short_shape("int64[target_sequence]") == "i64 [Q]"
    assert short_shape("batch") == "batch"
