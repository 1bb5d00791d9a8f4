"""The block pool: no leak, no block with two owners that write, shared prefixes, copies on write, corruption found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.engine.paging import BlockPool, OutOfBlocks, Pages
from graphwright.errors import GenerationError, GraphwrightError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["admit", "grow", "fork", "release"]), st.integers(0, 30)), max_size=80))
def test_any_order_of_operations_leaves_a_sound_table(operations):
    pool = BlockPool(12, 4)
    content: dict[int, list[int]] = {}
    held: list[tuple[Pages, list[int]]] = []

    def write(pages: Pages, tokens: list[int], start: int) -> None:
        for source, target in pool.own(pages, start, len(tokens)):
            content[target] = list(content[source])
        for slot in range(start, len(tokens)):
            content.setdefault(pages.blocks[slot // 4], [-1] * 4)[slot % 4] = tokens[slot]
        pages.length = len(tokens)
        pool.seal(pages, tokens)

    for number, (what, value) in enumerate(operations):
        try:
            if what == "admit":
                # Few different beginnings, so that they are shared.
                tokens = [value % 3] * 5 + [number] * (value % 9 + 1)
                pages = pool.admit(tokens)
                try:
                    pool.grow(pages, len(tokens))
                    write(pages, tokens, pages.length)
                except OutOfBlocks:
                    pool.release(pages)
                else:
                    held.append((pages, tokens))
            elif held:
                pages, tokens = held[value % len(held)]
                if what == "grow":
                    pool.grow(pages, len(tokens) + 1)
                    tokens.append(number)
                    try:
                        write(pages, tokens, len(tokens) - 1)
                    except OutOfBlocks:
                        tokens.pop()
                elif what == "fork":
                    held.append((pool.fork(pages), list(tokens)))
                else:
                    pool.release(pages)
                    held.pop(value % len(held))
        except OutOfBlocks:
            pass
        pool.check([pages for pages, _ in held])
        for pages, tokens in held:
            read = [content[pages.blocks[slot // 4]][slot % 4] for slot in range(pages.length)]
            assert read == tokens[: pages.length], "nobody wrote into another one's block"
    for pages, _ in held:
        pool.release(pages)
    assert pool.free == pool.total == 12


def test_equal_beginnings_share_and_the_last_token_is_computed():
    pool = BlockPool(10, 4)
    first = pool.admit(range(8))
    assert (first.blocks, first.length) == ([], 0)
    pool.grow(first, 8)
    first.length = 8
    pool.seal(first, range(8))
    second = pool.admit([*range(8), 99])
    assert second.blocks == first.blocks
    assert second.length == 8
    third = pool.admit(range(8))
    assert third.length == 7, "its logits are wanted"
    copies = pool.own(third, 7, 8)
    assert [source for source, _ in copies] == [first.blocks[1]]
    assert third.blocks[1] not in first.blocks
    other = pool.admit([5, 1, 2, 3, 4, 5, 6, 7, 8])
    assert other.blocks == []
    pool.check([first, second, third, other])


def test_text_of_free_blocks_is_found_until_they_are_taken():
    pool = BlockPool(2, 4)
    pages = pool.admit(range(4))
    pool.grow(pages, 4)
    pages.length = 4
    pool.seal(pages, range(4))
    block = pages.blocks[0]
    pool.release(pages)
    again = pool.admit([*range(4), 9])
    assert again.blocks == [block]
    pool.release(again)
    taken = Pages()
    pool.grow(taken, 8)
    assert pool.admit([*range(4), 9]).blocks == []


def test_growing_beyond_the_pool_changes_nothing():
    pool = BlockPool(2, 4)
    pages = Pages()
    pool.grow(pages, 5)
    with pytest.raises(OutOfBlocks):
        pool.grow(pages, 9)
    assert len(pages.blocks) == 2
    with pytest.raises(GenerationError, match="holds nothing"):
        BlockPool(0, 16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, b: a.blocks.__setitem__(0, b.blocks[0]), "block 0 is in 0 tables and has 1 holders"),
        (lambda a, b: a.blocks.append(99), "has block 99, and there are 8"),
        (lambda a, b: a.blocks.append(a.blocks[0]), "has a block twice"),
        (lambda a, b: a.blocks.pop(), "holds 7 tokens in 1 blocks"),
        (lambda a, b: setattr(a, "length", 9), "holds 9 tokens in 2 blocks"),
    ],
)
def test_corruption_is_found(spoil, message):
    pool = BlockPool(8, 4)
    one, other = Pages(), Pages()
    for pages in (one, other):
        pool.grow(pages, 7)
        pages.length = 7
    pool.check([one, other])
    spoil(one, other)
    with pytest.raises(GraphwrightError, match=message):
        pool.check([one, other])
