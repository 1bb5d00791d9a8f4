"""Structured pruning of attention heads: a key-value head goes with all the query heads that read it.

So the ratio of query to key-value heads stays what it was, in each layer. Where all query heads read one key-value head
(multi-query attention), that one stays and query heads go one by one. Where a family computes heads in a way whose rows
cannot be followed, they stay, and the report says why.
"""

from graphwright.dependency import Group, head_groups
from graphwright.pass_ import Paper
from graphwright.program import Program
from graphwright.unit_pruner import UnitPruner


class PruneHeads(UnitPruner):
    """Cuts groups of attention heads."""

    name = "prune_heads"
    paper = Paper("LLM-Pruner: On the Structural Pruning of Large Language Models", "Ma et al.", 2023, "2305.11627")
    what = "groups of heads"

    def groups(self, program: Program) -> tuple[list[Group], list[str]]:
        """Key-value heads with their query heads, or query heads alone."""
        return head_groups(program)
