"""Structured pruning of channels: rows of the layers that make a channel and columns of those that read it are cut.

Which ones belong together is found from the graph, see `graphwright.dependency`; the residual stream keeps its width.
Scores: `wanda` (weights that read the channel times the norm of what it carries, Sun et al. 2023, arXiv:2306.11695),
`taylor` (LLM-Pruner) and `magnitude`. Removing channels that carry nothing changes nothing.
"""

from pydantic import Field

from graphwright.dependency import Group, channel_groups
from graphwright.pass_ import Paper
from graphwright.program import Program
from graphwright.unit_pruner import UnitPruner, removed_to_multiple


class PruneChannels(UnitPruner):
    """Cuts channels between linear layers."""

    name = "prune_channels"
    paper = Paper("LLM-Pruner: On the Structural Pruning of Large Language Models", "Ma et al.", 2023, "2305.11627")
    what = "channels"

    multiple: int = Field(8, gt=0, description="the number of channels that stay is a multiple of this")

    def groups(self, program: Program) -> tuple[list[Group], list[str]]:
        """Channels of MLPs."""
        return channel_groups(program), []

    def removed(self, units: int) -> int:
        """So many that a multiple stays, and never more than the ratio."""
        return removed_to_multiple(units, self.ratio, self.multiple)
