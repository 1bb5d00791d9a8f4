"""The report as plain data: what a compile did, in a form that is saved, loaded and shown by several faces.

    report = Report.load("smollm2-int4/report.json")
    report.accuracy = measured.to_json()
    report.save("smollm2-int4/report.json")

Everything is numbers, texts, lists and dicts, so that a report outlives the classes it was made from.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from graphwright.errors import ArtifactError

VERSION = 1

Side = Literal["before", "after"]


class PassRow(TypedDict):
    """One line of the pass table; `near_misses` is split off from the notes."""

    name: str
    kind: str
    options: dict[str, Any]
    sites: int
    seconds: float
    error: float | None
    nodes_before: int
    nodes_after: int
    notes: dict[str, Any]
    near_misses: list[str]


class WeightRow(TypedDict):
    """One tensor. `format` is what it holds: its dtype, or `int4 codes`, `scale`, `zero point` and the like."""

    name: str
    dtype: str
    format: str
    shape: list[int]
    bytes: int
    readers: list[str]
    quantizable: bool
    """A floating-point tensor that is not part of a quantized one."""
    shares: str
    """The tensor whose memory it is, where two names stand for one; its bytes are then not counted again."""


class EstimateRow(TypedDict):
    """A roofline estimate of one call: the time of a machine that keeps nothing in its caches."""

    phase: str
    side: Side
    tokens: int
    sizes: dict[str, int]
    flops: float
    bytes: float
    seconds: float
    memory_bound_share: float
    note: str


class LengthRow(TypedDict):
    """Perplexity at the end of texts of this length; None where the original does not take as much."""

    length: int
    perplexity: float
    reference_perplexity: float | None


class PictureNode(TypedDict):
    """One box; `flops` and `cost_bytes` are at the sizes that the picture names."""

    id: str
    label: str
    kind: Literal["semantic", "aten", "view", "weight", "input"]
    text: str
    shape: str
    origin: str
    flops: float
    cost_bytes: float
    cost: str


class PictureEdge(TypedDict):
    """One arrow; `order` is a write that a later read waits for."""

    source: str
    target: str
    kind: Literal["data", "order"]


class Picture(TypedDict):
    """A part of a graph, drawn by every face in its own way."""

    title: str
    sizes: dict[str, int]
    nodes: list[PictureNode]
    edges: list[PictureEdge]


@dataclass
class Report:
    """What was compiled, what each pass did, and what came out. Fields that may be None are filled in later."""

    model: dict[str, Any]
    target: dict[str, Any]
    backend: str
    recipe: dict[str, Any]
    passes: list[PassRow]
    nodes: dict[Side, int]
    ops: dict[Side, dict[str, int]]
    semantic_ops: list[str]
    weights: dict[Side, list[WeightRow]]
    weight_bytes: dict[Side, dict[str, int]]
    unquantized_bytes: int
    cost: dict[Side, dict[str, str]]
    estimates: list[EstimateRow]
    coverage: dict[str, Any]
    pictures: dict[Side, Picture]
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]
    artifact_bytes: int | None = None
    speed: dict[str, Any] | None = None
    accuracy: dict[str, Any] | None = None
    lengths: list[LengthRow] | None = None
    export: dict[str, Any] | None = None
    """Format, options, files with their sizes, what the format says, and what running it has shown."""
    version: int = field(default=VERSION)

    def plain(self) -> "Report":
        """The report as it is after saving and loading: lists for tuples, text for what JSON does not know."""
        return Report.from_json(json.loads(json.dumps(self.to_json(), default=str)))

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Report":
        """Rebuilds a report from `to_json`.

        Raises:
            ArtifactError: the data was written by another version of the format, or lacks a part.
        """
        if not isinstance(data, Mapping):
            raise ArtifactError("The report is not a JSON object", fix="Compile the model again")
        if data.get("version") != VERSION:
            raise ArtifactError(
                f"The report has format {data.get('version')}; this version reads format {VERSION}",
                fix="Compile the model again",
            )
        known = {one.name for one in fields(Report)}
        try:
            return Report(**{key: value for key, value in data.items() if key in known})
        except TypeError as error:
            raise ArtifactError(f"The report is incomplete: {error}", fix="Compile the model again") from error

    def save(self, file: Path | str) -> None:
        """Writes the report as JSON."""
        Path(file).write_text(json.dumps(self.to_json(), indent=1))

    @staticmethod
    def load(file: Path | str) -> "Report":
        """Reads what `save` wrote.

        Raises:
            ArtifactError: the file cannot be read.
        """
        try:
            data = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"Report {file} cannot be read: {error}") from error
        return Report.from_json(data)
