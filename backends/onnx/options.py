"""How to write ONNX: the profile says which operators may stand in the file, the opset of which version they are."""

from typing import Any, Literal

import onnx
from pydantic import Field, model_validator

from graphwright.export_format import FormatOptions

Profile = Literal["ort", "standard", "tensorrt"]

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
    def ir_version(self) -> int:
        """The oldest file format that has the opset."""
        return max(IR_VERSION, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)]))
