"""Who holds which block of the KV pool, and what can be used again. Plain Python, no tensors.

A block is free (holds nothing), used (rows hold references to it) or cached (nobody holds it, its content is known).
What blocks hold is a tree: a node is one block, its children are the blocks that came after it, so the path to a node
is the text before it. There is one root for each salt: tenants never meet. A lookup walks the tree and compares tokens,
so nothing collides (prefix reuse as in vLLM and SGLang's RadixAttention, Zheng et al. 2024).

            free ──allocate──> used ──release──> cached ──allocate, the least recently used──> used
              ^                 │  ^                │
              └──release: it ───┘  └──────match─────┘
                 holds nothing
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_COMPARED_CHILDREN = 32  # of one node, the newest, when the last block matches in part only


@dataclass(eq=False, slots=True)
class Node:
    """One block of known content. A root has no block and no tokens."""

    parent: "Node | None"
    tokens: tuple[int, ...]
    block: int
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Lease:
    """The blocks of one row, in order. Set by `BlockPool` alone."""

    salt: str
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)  # of the first blocks, whose content is in the tree


@dataclass(frozen=True, slots=True)
class Match:
    """What the pool already has of a prompt."""

    lease: Lease
    cached_tokens: int
    copy: tuple[int, int] | None = None  # copy this block to that before the step: it matches in part


class BlockPool:
    """Hands out blocks. Every operation is O(blocks it names)."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks - 1, -1, -1))
        self._references = [0] * blocks
        self._cached: OrderedDict[Node, None] = OrderedDict()  # without references, least recently used first
        self._nodes: dict[int, Node] = {}  # by block
        self._roots: dict[str, Node] = {}

    @property
    def available(self) -> int:
        """Blocks that could be handed out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def match(self, salt: str, token_ids: Sequence[int]) -> Match:
        """Take references to the blocks that hold the beginning of these tokens, but never the last one.

        A row needs at least one token to compute. If a block matches in part, a fresh block is taken to copy it into.
        """
        lease, size, node = Lease(salt), self.block_tokens, self._roots.get(salt)
        usable = len(token_ids) - 1
        while node and (len(lease.nodes) + 1) * size <= usable:
            at = len(lease.nodes) * size
            node = node.children.get(tuple(token_ids[at : at + size]))
            if node:
                self._reference(node.block)
                lease.nodes.append(node)
                lease.blocks.append(node.block)
        cached = len(lease.nodes) * size
        partial, common = self._closest(lease, token_ids[cached : min(cached + size, usable)])
        if partial is None or not self.grow(lease, cached + 1, spare=partial):
            return Match(lease, cached)
        return Match(lease, cached + common, (partial.block, lease.blocks[-1]))

    def grow(self, lease: Lease, tokens: int, *, spare: Node | None = None) -> bool:
        """Make room for so many tokens in total; False, and nothing changed, if there is none.

        The content of `spare` is not given up for it.
        """
        wanted = self.blocks_for(tokens) - len(lease.blocks)
        spared = spare is not None and spare in self._cached
        if wanted > self.available - spared:
            return False
        if spared and spare:
            self._cached.move_to_end(spare)
        lease.blocks += [self._allocate() for _ in range(wanted)]
        return True

    def publish(self, lease: Lease, token_ids: Sequence[int]) -> None:
        """The row has computed these tokens, from its beginning: what fills a block may be used again by others.

        If the same content is known already, the row goes on with that block and gives its own back.
        """
        size = self.block_tokens
        for at in range(len(lease.nodes), len(token_ids) // size):
            tokens = tuple(token_ids[at * size : (at + 1) * size])
            lease.nodes.append(self._publish(lease, at, tokens))

    def release(self, lease: Lease, token_ids: Sequence[int]) -> None:
        """Give every block back; what is in these tokens stays known until its room is needed."""
        self.publish(lease, token_ids)
        rest = tuple(token_ids[len(lease.nodes) * self.block_tokens :])
        if rest and self._parent(lease).children.get(rest) is None:
            lease.nodes.append(self._publish(lease, len(lease.nodes), rest))
        # the last first: what is least recently used is then always a leaf of the tree
        for block in reversed(lease.blocks):
            self._dereference(block)
        lease.blocks, lease.nodes = [], []
        self._forget_root(lease.salt)

    def forget(self) -> None:
        """Drop all that is cached: its content can no longer be trusted."""
        while self._cached:
            self._evict()

    def check(self) -> None:
        """Raise AssertionError unless free, cached and used blocks are all blocks, each in one place."""
        free, cached = set(self._free), {node.block for node in self._cached}
        used = {block for block, references in enumerate(self._references) if references > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not free & used and not cached & used, "a block is in two places"  # noqa: PT018
        assert len(free) + len(cached) + len(used) == self.blocks, "a block is lost"
        for block, node in self._nodes.items():
            assert node.block == block
            assert node.parent is None or node.parent.children.get(node.tokens) is node
        # a node's parent is cached later than itself, or used
        seen: set[Node] = set()
        for node in self._cached:
            assert all(child in seen for child in node.children.values()), "a parent is older than its child"
            seen.add(node)

    @property
    def used(self) -> int:
        """Blocks that rows hold."""
        return self.blocks - self.available

    # -- one block ------------------------------------------------------------------------------------------------

    def _allocate(self) -> int:
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _evict(self) -> None:
        """Forget the least recently used content: a leaf, for children are released before their parents."""
        node, _ = self._cached.popitem(last=False)
        self._unlink(node)
        self._free.append(node.block)

    def _unlink(self, node: Node) -> None:
        del self._nodes[node.block]
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.tokens]
        if parent.parent is None and not parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}

    def _reference(self, block: int) -> None:
        self._references[block] += 1
        if self._references[block] == 1:
            del self._cached[self._nodes[block]]

    def _dereference(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if node := self._nodes.get(block):
            self._cached[node] = None
        else:
            self._free.append(block)

    # -- the tree -------------------------------------------------------------------------------------------------

    def _parent(self, lease: Lease) -> Node:
        """The node after which the lease's next block comes."""
        return lease.nodes[-1] if lease.nodes else self._roots.setdefault(lease.salt, Node(None, (), -1))

    def _publish(self, lease: Lease, at: int, tokens: tuple[int, ...]) -> Node:
        parent, block = self._parent(lease), lease.blocks[at]
        known = parent.children.get(tokens)
        if known:
            self._reference(known.block)
            self._dereference(block)
            lease.blocks[at] = known.block
            return known
        node = Node(parent, tokens, block)
        parent.children[tokens] = node
        self._nodes[block] = node
        return node

    def _closest(self, lease: Lease, token_ids: Sequence[int]) -> tuple[Node | None, int]:
        """Among what followed the lease's blocks, the block that has most of these tokens in common, and how many."""
        parent = lease.nodes[-1] if lease.nodes else self._roots.get(lease.salt)
        best: tuple[Node | None, int] = (None, 0)
        if parent is None or not token_ids:
            return best
        for number, node in enumerate(reversed(parent.children.values())):
            if number == _COMPARED_CHILDREN:
                break
            common = _common(node.tokens, token_ids)
            if common > best[1]:
                best = (node, common)
        return best

    def _forget_root(self, salt: str) -> None:
        root = self._roots.get(salt)
        if root is not None and not root.children:
            del self._roots[salt]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for at, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return at
    return min(len(left), len(right))
