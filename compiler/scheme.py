"""The vocabulary of weight quantization: how one matrix is rounded, and what a recipe changes for some layers.

Scheme(format="int3", group_size=128, symmetric=False)
LayerOptions(format="int8", group_size=0)
"""

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graphwright.contract import DTYPES
from graphwright.packing import FORMATS, Format

FormatName = Literal["int2", "int3", "int4", "int8", "nf4", "mxfp4", "fp8_e4m3", "fp8_e5m2"]
ScaleType = Literal["float16", "bfloat16", "float32"]

WHOLE_TENSOR = -1


class Scheme(BaseModel):
    """How a weight [N, K] is rounded.

    A group size that does not divide K leaves a shorter last group: it is padded with zeros in storage and scaled by
    its own weights alone. One that is K or more means one group per row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: FormatName = Field("int4", description="what one weight is stored as")
    group_size: int = Field(64, ge=WHOLE_TENSOR, description="weights that share a scale; 0: a row; -1: the tensor")
    symmetric: bool = Field(False, description="no zero points; floating-point formats have none")
    scale_dtype: ScaleType = Field("float16", description="dtype of the scales")
    zero_dtype: Literal["code", "float16"] = Field("code", description="zero points are codes, or fractions of one")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.group_size > 0 and self.group_size % self.kind.unit:
            raise ValueError(
                f"the group size of {self.format} is a multiple of {self.kind.unit}, so that a group fills whole bytes"
            )
        if not self.symmetric and not self.kind.integer:
            raise ValueError(f"{self.format} has no zero points, so its scheme is symmetric")
        if not self.symmetric and self.group_size == WHOLE_TENSOR:
            raise ValueError("a scale for the whole tensor goes without zero points: set symmetric")
        return self

    @property
    def kind(self) -> Format:
        """The storage format."""
        return FORMATS[self.format]

    @property
    def scale_type(self) -> torch.dtype:
        """Dtype of the scales."""
        return DTYPES[self.scale_dtype]

    def group(self, width: int) -> int:
        """The group size in storage for K = `width`: a whole row is rounded up to whole bytes."""
        if 0 < self.group_size < width:
            return self.group_size
        return -(-width // self.kind.unit) * self.kind.unit

    def bytes(self, rows: int, width: int) -> int:
        """Stored size of a [rows, width] matrix, scales, zero points and padding included."""
        group = self.group(width)
        groups = -(-width // group)
        zero = 0 if self.symmetric else 1 if self.zero_dtype == "code" else 2
        return rows * groups * (group * self.kind.bits // 8 + self.scale_type.itemsize + zero)


class LayerOptions(BaseModel):
    """What a recipe changes of the scheme for some layers; `keep` leaves them in floating point."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep: bool = False
    format: FormatName | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scale_dtype: ScaleType | None = None

    def apply(self, scheme: Scheme) -> Scheme | None:
        """The changed scheme, or None for a layer that is kept.

        Raises:
            ValidationError: the change makes a scheme that does not exist.
        """
        if self.keep:
            return None
        changes: dict[str, Any] = self.model_dump(exclude_none=True, exclude={"keep"})
        return Scheme.model_validate({**scheme.model_dump(), **changes})
