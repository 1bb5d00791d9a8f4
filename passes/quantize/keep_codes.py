"""The codes of a checkpoint that is quantized already, kept as they are.

    before                                      after
    model.gguf, a GPTQ or AWQ directory, …      y = quantized_linear(x, the checkpoint's codes, scale, zero_point, b)

With this pass in a recipe the model is read with its codes (`graphwright.interchange`), so that capture meets quantized
layers already and no floating-point copy of their weights is ever made. The pass itself changes nothing: it refuses a
model without codes, and says which layers hold which. It takes the place of the methods that round, none of which may
stand beside it. No paper: nothing is approximated.
"""

from collections import Counter

from torch import fx

from graphwright.errors import PassError
from graphwright.match import argument
from graphwright.ops import quantized_embedding, quantized_experts, quantized_linear
from graphwright.pass_ import Context, Pass, PassResult
from graphwright.program import Program


class KeepCodes(Pass):
    """Keeps what a quantized checkpoint holds."""

    name = "keep_codes"
    kind = "exact"
    requires = ("linear",)
    provides = ("quantized",)
    conflicts = ("quantized",)
    reads_codes = True

    def run(self, program: Program, context: Context) -> PassResult:
        """Counts the layers that hold codes.

        Raises:
            PassError: there are none.
        """
        nodes = list(program.calls(quantized_linear.target, quantized_embedding.target, quantized_experts.target))
        if not nodes:
            raise PassError(
                "The model holds no weights in codes, so there are none to keep",
                where=program.metadata.name,
                fix="Give a GGUF file, or a directory of GPTQ, AWQ or compressed-tensors weights; or use a recipe that "
                "quantizes, such as int4",
            )
        return PassResult(program, notes={"layers": dict(Counter(_stored(node) for node in nodes))})


def _stored(node: fx.Node) -> str:
    """How the codes of a call are stored."""
    if node.target != quantized_experts.target:
        return f"{argument(node, 'format')} in groups of {argument(node, 'group_size')}"
    sizes = dict.fromkeys(str(argument(node, f"{name}_group_size")) for name in ("up", "down"))
    count = argument(node, "up").meta["val"].shape[0]
    return f"{count} experts, {argument(node, 'format')} in groups of {' and '.join(sizes)}"
