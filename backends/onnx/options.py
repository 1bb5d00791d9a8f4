"""How to write ONNX: the profile says which operators may stand in the file, the opset of which version they are."""

from typing import Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field

Profile = Literal["ort", "standard"]

IR_VERSION = 10
"""What all runtimes of the last years read; opsets that need a newer one get it."""


class OnnxOptions(BaseModel):
    """Options of the format `onnx`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile = Field(
        "ort",
        description="ort: ONNX Runtime's own operators too; standard: only those of ai.onnx",
    )
    opset: Literal[20, 24] = Field(20, description="version of the ai.onnx operators")
    wide_codes: bool = Field(False, description="store codes that the opset has no type for in 8 bits each")
    integer_products: bool = Field(
        False, description="ort: let products round activations to 8 bits per block; faster, and less exact"
    )

    @property
    def ir_version(self) -> int:
        """The oldest file format that has the opset."""
        return max(IR_VERSION, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.opset)]))
