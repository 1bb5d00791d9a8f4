"""Says how often each expert is chosen on calibration data, and which part of the choices a capacity drops.

    before = after; notes: usage {layer: [choices of each expert]}, dropped {layer: part of all choices}

For models whose own routers have a capacity (Switch), and for choosing the options of the passes that remove experts.
"""

from graphwright.expert_quantizer import Routed
from graphwright.pass_ import Context, Paper, Pass, PassResult
from graphwright.passes.moe._raised import MoeLayer, dropped_share, moe_layers, observe
from graphwright.program import Program


class ExpertUsage(Pass):
    """Measures, and changes nothing."""

    name = "expert_usage"
    kind = "exact"
    paper = Paper(
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        "Fedus et al.",
        2021,
        "2101.03961",
    )
    requires = ("experts",)
    after = ("fewer_experts", "fewer_active_experts", "expert_capacity")

    @property
    def calibrates(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> PassResult:
        """Counts choices.

        Raises:
            PassError: there is nothing to calibrate on.
        """
        layers, misses = moe_layers(program)
        usage: dict[str, list[int]] = {}

        def visit(layer: MoeLayer, seen: Routed) -> None:
            usage[layer.name] = seen.usage(layer.count).tolist()

        if layers:
            observe(program, context, layers, visit)
        notes = {"usage": usage, "dropped": dropped_share(program, context), **({"left": misses} if misses else {})}
        return PassResult(program, notes=notes)
