"""What a report holds: counts and bytes counted by hand, and a round trip through JSON."""

import json

import pytest
from report.made import llama, llama_report, report, two_linears

from graphwright.errors import ArtifactError
from graphwright.report.collect import Report


def test_json_round_trip(tmp_path):
    made = llama_report()
    again = Report.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made
    made.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == made


def test_another_version_is_refused():
    data = {**llama_report().to_json(), "version": 99}
    with pytest.raises(ArtifactError, match="format 99"):
        Report.from_json(data)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"version": 1}'])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ArtifactError):
        Report.load(tmp_path / "report.json")


def test_counts_of_a_module_counted_by_hand():
    program = two_linears()
    made = report(program, program)
    assert made.ops["before"] == {"linear": 2, "add.Tensor": 1, "relu": 1}
    assert made.weight_bytes["before"] == {"float32": 8 * 4 * 4 + 2 * 8 * 4, "float64": 16}
    assert made.nodes["before"] == 1 + 3 + 4 + 1  # input, weights, calls, output
    assert made.unquantized_bytes == 128 + 64 + 16
    rows = {row["name"]: row for row in made.weights["before"]}
    assert rows["first.weight"]["shape"] == [8, 4]
    assert rows["first.weight"]["readers"] == ["linear"]
    assert rows["shift"]["readers"] == ["add.Tensor"]


def test_quantized_parts_are_known_by_how_they_are_read():
    made = llama_report()
    formats = {row["name"]: row["format"] for row in made.weights["after"]}
    assert set(formats.values()) == {"int4 codes", "int8 codes", "float16 scale", "uint8 zero point", "float32"}
    unquantized = [row for row in made.weights["after"] if row["quantizable"]]
    assert {reader for row in unquantized for reader in row["readers"]} == {"rms_norm", "rope"}
    assert made.unquantized_bytes == sum(row["bytes"] for row in unquantized) == 7 * 64 * 4 + 8 * 4


def test_weights_may_be_gone():
    before, after = llama()
    assert report(before.shape_only(), after).weight_bytes == report(before, after).weight_bytes


def test_a_tied_weight_counts_once():
    program = two_linears()
    program.module.first.weight = program.module.shift
    made = report(program, program)
    shared = [row for row in made.weights["before"] if row["shares"]]
    assert [row["shares"] for row in shared] == ["first.weight"]
    assert sum(made.weight_bytes["before"].values()) == 16 + 64


def test_estimates_name_their_inputs_and_say_when_tokens_are_recomputed():
    rows = {(row["phase"], row["side"]): row for row in llama_report().estimates}
    decode = rows["decode after 128", "after"]
    assert decode["sizes"]["sequence"] == 1
    assert decode["sizes"]["keys"] == 129
    assert decode["note"] == ""
    assert rows["decode after 128", "before"]["sizes"]["sequence"] == 129
    assert "129 tokens" in rows["decode after 128", "before"]["note"]
    assert decode["seconds"] > 0
    assert {row["tokens"] for row in rows.values()} == {1, 512}


def test_near_misses_are_split_from_notes():
    rows = {row["name"]: row for row in llama_report().passes}
    assert rows["raise_nothing"]["near_misses"] == ["the scale is not a constant"]
    assert rows["raise_nothing"]["notes"] == {}
    assert rows["rtn"]["options"] == {"group_size": 32}


def test_costs_are_symbolic():
    cost = llama_report().cost
    assert "sequence**2" in cost["before"]["flops"]
    assert "keys" in cost["after"]["bytes"]


def test_nothing_is_run(monkeypatch):
    program = two_linears()
    monkeypatch.setattr(type(program), "__call__", None)
    assert report(program, program, coverage={}, seconds={}).coverage == {}
