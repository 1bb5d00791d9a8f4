"""Who has which block of a paged cache: a pool with reference counts, shared prefixes and copies on write.

    pool = BlockPool(blocks=64, block_size=16)
    pages = pool.admit([5, 6, 7, …])            # blocks whose text is known already are shared
    pool.grow(pages, length)                    # blocks for more tokens; OutOfBlocks if there are none
    for source, target in pool.own(pages, start, end):
        copy(source, target)                    # blocks that others read too, before slots in them are written
    pool.seal(pages, tokens)                    # full blocks may be shared from now on
    pool.release(pages)

Kwon et al. 2023, arXiv:2309.06180. Blocks that nobody has keep their text until they are taken for another one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from graphwright.errors import GenerationError, GraphwrightError

Text = tuple["Text | None", tuple[int, ...]]
"""What a full block holds: the text of the block before it, and its own tokens."""


class OutOfBlocks(Exception):  # noqa: N818  (a condition that the scheduler handles, not an error)
    """There are fewer free blocks than are asked for."""


@dataclass
class Pages:
    """The blocks of one sequence in order, and how many tokens they hold."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class BlockPool:
    """Blocks 0 … blocks - 1, each free or held by one or more sequences."""

    def __init__(self, blocks: int, block_size: int, *, share: bool = True) -> None:
        if blocks < 1 or block_size < 1:
            raise GenerationError(f"A pool of {blocks} blocks of {block_size} tokens holds nothing")
        self.block_size = block_size
        self.copied = self.shared = 0
        """Blocks that were copied before they were written, and taken over with their text."""
        self._share = share
        self._holders = [0] * blocks
        # In the order in which they became free: the text of the last one is the most likely to come again.
        self._free: dict[int, None] = dict.fromkeys(range(blocks))
        self._text: dict[int, Text] = {}
        self._block_of: dict[Text, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    @property
    def total(self) -> int:
        """All blocks."""
        return len(self._holders)

    def needed(self, length: int) -> int:
        """Blocks for so many tokens."""
        return -(-length // self.block_size)

    def admit(self, tokens: Sequence[int]) -> Pages:
        """Pages that hold as much of the beginning of `tokens` as is in the pool, the last token left out."""
        pages = Pages()
        text: Text | None = None
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size) if self._share else ():
            text = (text, tuple(tokens[start : start + self.block_size]))
            block = self._block_of.get(text)
            if block is None:
                break
            self._hold(block)
            pages.blocks.append(block)
            self.shared += 1
        # The last token is computed in any case: its logits are wanted.
        pages.length = min(len(pages.blocks) * self.block_size, len(tokens) - 1)
        return pages

    def grow(self, pages: Pages, length: int) -> None:
        """Adds blocks until `length` tokens have room.

        Raises:
            OutOfBlocks: there are not enough; nothing has changed.
        """
        missing = self.needed(length) - len(pages.blocks)
        if missing > self.free:
            raise OutOfBlocks
        pages.blocks += [self._take() for _ in range(missing)]

    def own(self, pages: Pages, start: int, end: int) -> list[tuple[int, int]]:
        """Makes sure that nobody else has the blocks of slots start … end - 1; returns (from, to) of blocks to copy.

        Raises:
            OutOfBlocks: there is no block for a copy; nothing has changed.
        """
        places = range(start // self.block_size, self.needed(end))
        shared = [place for place in places if self._holders[pages.blocks[place]] > 1]
        if len(shared) > self.free:
            raise OutOfBlocks
        copies = []
        for place in places:
            block = pages.blocks[place]
            if place in shared:
                pages.blocks[place] = self._take()
                copies.append((block, pages.blocks[place]))
                self._holders[block] -= 1
            else:
                self._forget(block)
        self.copied += len(copies)
        return copies

    def seal(self, pages: Pages, tokens: Sequence[int]) -> None:
        """Remembers the text of full blocks, so that other sequences may share them."""
        text: Text | None = None
        for place in range(pages.length // self.block_size):
            block = pages.blocks[place]
            text = (text, tuple(tokens[place * self.block_size : (place + 1) * self.block_size]))
            if text not in self._block_of and block not in self._text:
                self._text[block] = text
                self._block_of[text] = block

    def fork(self, pages: Pages) -> Pages:
        """Pages with the same blocks, which are copied when either of the two writes."""
        for block in pages.blocks:
            self._hold(block)
        return Pages(list(pages.blocks), pages.length)

    def release(self, pages: Pages) -> None:
        """Gives all blocks back."""
        for block in pages.blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
        pages.blocks, pages.length = [], 0

    def waste(self, sequences: Iterable[Pages]) -> float:
        """The share of slots in held blocks that hold no token."""
        used: dict[int, int] = {}
        for pages in sequences:
            for place, block in enumerate(pages.blocks):
                tokens = min(self.block_size, max(0, pages.length - place * self.block_size))
                used[block] = max(used.get(block, 0), tokens)
        slots = len(used) * self.block_size
        return 1 - sum(used.values()) / slots if slots else 0.0

    def check(self, sequences: Sequence[Pages]) -> None:
        """Looks for tables that contradict the pool.

        Raises:
            GraphwrightError: naming the sequence or block, and what is wrong with it.
        """
        counted = [0] * self.total
        for number, pages in enumerate(sequences):
            if len(set(pages.blocks)) != len(pages.blocks):
                raise _corrupt(f"sequence {number} has a block twice: {pages.blocks}")
            if pages.length > len(pages.blocks) * self.block_size:
                raise _corrupt(f"sequence {number} holds {pages.length} tokens in {len(pages.blocks)} blocks")
            for block in pages.blocks:
                if not 0 <= block < self.total:
                    raise _corrupt(f"sequence {number} has block {block}, and there are {self.total}")
                counted[block] += 1
        for block, (count, known) in enumerate(zip(counted, self._holders, strict=True)):
            if count != known:
                raise _corrupt(f"block {block} is in {count} tables and has {known} holders")
            if (block in self._free) != (count == 0):
                raise _corrupt(
                    f"block {block} is in {count} tables and {'free' if block in self._free else 'not free'}"
                )

    def _take(self) -> int:
        block = next(iter(self._free))
        self._forget(block)
        self._hold(block)
        return block

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1

    def _forget(self, block: int) -> None:
        """Drops what is known of the text of a block that is about to be written."""
        text = self._text.pop(block, None)
        if text is not None:
            del self._block_of[text]


def _corrupt(what: str) -> GraphwrightError:
    return GraphwrightError(
        f"The page table is corrupt: {what}", fix="This is a defect of Graphwright, or of what wrote into its tables"
    )
