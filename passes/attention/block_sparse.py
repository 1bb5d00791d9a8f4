"""Local and global attention in blocks: a query sees its block, some blocks before it, and the first blocks.

The local and global part of Longformer (Beltagy et al. 2020, arXiv:2004.05150) in the blocks of Big Bird, without
Big Bird's random blocks; tokens of the global blocks see everything where attention looks both ways. Blocks that are
whole multiples of a kernel's are skipped or computed as a whole.
"""

from collections.abc import Mapping

from pydantic import Field

from graphwright.pass_ import Paper
from graphwright.passes.attention._limiting import LimitedAttention


class BlockSparse(LimitedAttention):
    """Sets a window and anchors in whole blocks."""

    name = "block_sparse"
    paper = Paper("Big Bird: Transformers for Longer Sequences", "Zaheer et al.", 2020, "2007.14062")

    block: int = Field(64, gt=1, description="tokens of a block")
    local: int = Field(3, gt=0, description="blocks up to its own that a query sees, and as many after it both ways")
    global_blocks: int = Field(1, ge=0, description="first blocks that every query sees")

    @property
    def limits(self) -> Mapping[str, int]:
        """Window and anchors in tokens, counted in blocks."""
        return {"window": self.local * self.block, "anchors": self.global_blocks * self.block, "block": self.block}
