"""How to write ONNX: the profile says which operators may stand in the file, the opset of which version they are."""

from typing import Any, Literal

import onnx
from pydantic import Field, model_validator

from graphwright import packing
from graphwright.backends.tensorrt.takes import FORMATS
from graphwright.export_format import FormatOptions

Profile = Literal["ort", "standard", "tensorrt"]

CARRIED = {"ort": ("int8", "int4"), "standard": ("int8", "int4"), "tensorrt": FORMATS}
"""Weight formats that each profile has a form for."""

FOUR_BIT_OPSET = 21
"""The first opset with types of 4 bits."""

IR_VERSION = 10
"""What all runtimes of the last years read; opsets that need a newer one get it."""


class OnnxOptions(FormatOptions):
    """Options of the format `onnx`."""

    profile: Profile = Field(
        "ort",
        description="ort: ONNX Runtime's own operators too; standard: ai.onnx alone; tensorrt: what its parser takes",
    )
    opset: Literal[20, 24] = Field(20, description="version of the ai.onnx operators; 24 for tensorrt")
    wide_codes: bool = Field(False, description="store codes that the opset has no type for in 8 bits each")
    decompose: bool = Field(
        False, description="write weights that the file has no type for in plain operators: tables, zeros in full"
    )
    integer_products: bool = Field(
        False, description="ort: let products round activations to 8 bits per block; faster, and less exact"
    )

    @model_validator(mode="before")
    @classmethod
    def _opset_of_profile(cls, given: Any) -> Any:
        """TensorRT's forms of int4 and attention are of opset 24."""
        if isinstance(given, dict) and given.get("profile") == "tensorrt" and given.setdefault("opset", 24) != 24:
            raise ValueError("profile tensorrt needs opset 24")
        return given

    @property
    def wide(self) -> bool:
        """Whether a code may take more bits than it has."""
        return self.wide_codes or self.decompose

    def refusal(self, format: str) -> tuple[str, str] | None:
        """What keeps weights of a format out of the file, and what to do; None if they are carried."""
        if format in packing.FORMATS and packing.FORMATS[format].offset:
            return (
                f"ONNX has no form for weights of format {format}, whose codes have an offset in place of zero points",
                "Use a recipe that quantizes, such as int4, in place of the checkpoint's own codes",
            )
        if self.decompose:
            return None
        if format not in CARRIED[self.profile]:
            return (
                f"Profile {self.profile} of ONNX cannot carry weights of format {format}",
                f"It carries {', '.join(CARRIED[self.profile])}; decompose=true writes others in plain operators",
            )
        if format == "int4" and self.profile == "standard" and self.opset < FOUR_BIT_OPSET and not self.wide:
            return (
                f"Opset {self.opset} of ai.onnx has no 4-bit type",
                "Set opset=24 or profile=ort, or wide_codes=true, which stores each code in 8 bits",
            )
        return None

    @property
    def ir_version(self) -> int:
        """The oldest file format that has the opset."""
        return max(IR_VERSION, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)]))
