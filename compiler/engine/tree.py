"""Checking a tree of guesses in one call: which tokens to run over, who sees whom, and what holds.

    tree = likely_tree(last, log_probabilities, nodes=16)      # every path is one continuation
    logits, hidden = steps.verify(length, tree)                # one call over all nodes
    path, following = best_path(tree, logits.argmax(-1))       # the guesses that hold, and the token behind them

Node 0 is the last token of the text, which is certain; a node sees the text, its ancestors and itself. Greedy, the
tokens are those of plain decoding. Miao et al. 2023, SpecInfer, arXiv:2305.09781; Cai et al. 2024, arXiv:2401.10774.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Guesses.

    Attributes:
        tokens: of all nodes, each behind its parent.
        parents: place of each node's parent; -1 for node 0.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> Tensor:
        """int64 [n], how far each node is behind node 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return torch.tensor(depths)

    def mask(self, length: int) -> Tensor:
        """float32 [n, length + n]: 0 where a node sees a slot, -inf where it does not; `length` slots are text."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        mask = torch.zeros(len(self), length + len(self))
        mask[:, length:].masked_fill_(~seen, float("-inf"))
        return mask


def likely_tree(last: int, log_probabilities: Tensor, nodes: int) -> Tree:
    """The most likely continuations, if the guesses of each depth do not depend on each other.

    Args:
        last: the token that is certain.
        log_probabilities: [K, V], of the token at each depth.
        nodes: how many guesses; every node has its parent in the tree, because a path is never more likely than its
            beginning.
    """
    depth, vocabulary = log_probabilities.shape
    best = log_probabilities.topk(min(nodes, vocabulary), dim=-1)
    values, choices = best.values.tolist(), best.indices.tolist()
    tokens, parents = [last], [-1]
    # (minus log-likelihood, parent, depth, rank): the next sibling or the first child of what was taken follows it.
    waiting = [(-values[0][0], 0, 0, 0, 0.0)] if nodes and depth else []
    while waiting and len(tokens) <= nodes:
        cost, parent, level, rank, above = heapq.heappop(waiting)
        tokens.append(choices[level][rank])
        parents.append(parent)
        if rank + 1 < len(choices[level]):
            heapq.heappush(waiting, (above - values[level][rank + 1], parent, level, rank + 1, above))
        if level + 1 < depth:
            heapq.heappush(waiting, (cost - values[level + 1][0], len(tokens) - 1, level + 1, 0, cost))
    return Tree(tuple(tokens), tuple(parents))


def best_path(tree: Tree, choices: Sequence[int]) -> tuple[list[int], int]:
    """The nodes that hold, node 0 first, and the token that follows the last.

    Args:
        tree: the guesses.
        choices: what the program chooses behind each node.
    """
    path = [0]
    while True:
        wanted = int(choices[path[-1]])
        here = path[-1]
        child = next((n for n, p in enumerate(tree.parents) if p == here and tree.tokens[n] == wanted), None)
        if child is None:
            return path, wanted
        path.append(child)
