"""The accounts of the KV pool's blocks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from models.blocks import BlockPool, Lease, Match

SIZE = 4


def row(pool: BlockPool, token_ids: list[int], salt: str = "a") -> Match:
    """A row that has computed these tokens and holds their blocks."""
    match = pool.match(salt, token_ids)
    assert pool.grow(match.lease, len(token_ids))
    pool.publish(match.lease, token_ids)
    return match


def test_what_a_row_left_behind_is_found_again() -> None:
    """Whole blocks are shared, a part of one is copied, and the last token is always left to compute."""
    pool = BlockPool(10, SIZE)
    tokens = list(range(11))
    first = row(pool, tokens)
    held = list(first.lease.blocks)
    pool.release(first.lease, tokens)
    assert (pool.used, pool.available) == (0, 10)
    again = pool.match("a", tokens)
    assert again.cached_tokens == 10
    assert again.lease.blocks[:2] == held[:2]
    assert again.copy == (held[2], again.lease.blocks[2])
    assert held[2] != again.lease.blocks[2]


def test_text_that_goes_another_way_is_shared_up_to_there() -> None:
    """Of a block that differs in its middle, the part before is copied; a first token that differs finds nothing."""
    pool = BlockPool(10, SIZE)
    one = row(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    other = pool.match("a", [1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert (other.cached_tokens, other.lease.blocks[0]) == (6, one.lease.blocks[0])
    assert other.copy == (one.lease.blocks[1], other.lease.blocks[1])
    nothing = pool.match("a", [2, 2, 3, 4, 5])
    assert (nothing.cached_tokens, nothing.copy, nothing.lease.blocks) == (0, None, [])


def test_tenants_never_meet() -> None:
    """The same text under another salt finds nothing."""
    pool = BlockPool(10, SIZE)
    row(pool, list(range(9)), "a")
    assert pool.match("b", list(range(9))).cached_tokens == 0


def test_equal_content_is_kept_once() -> None:
    """Two rows that computed the same go on with one block."""
    pool = BlockPool(10, SIZE)
    tokens = list(range(8))
    one, two = pool.match("a", tokens), pool.match("a", tokens)
    for match in (one, two):
        pool.grow(match.lease, 8)
    pool.publish(one.lease, tokens)
    pool.publish(two.lease, tokens)
    assert one.lease.blocks == two.lease.blocks
    assert pool.used == 2


def test_the_least_recently_used_goes_first_and_leaves_before_their_parents() -> None:
    """One block at a time, from the end of the oldest text."""
    pool = BlockPool(4, SIZE)
    old, new = row(pool, list(range(8))), row(pool, list(range(50, 58)))
    pool.release(old.lease, list(range(8)))
    pool.release(new.lease, list(range(50, 58)))
    lease = Lease("a")
    assert pool.grow(lease, SIZE)
    assert pool.match("a", list(range(9))).cached_tokens == 4
    assert pool.match("a", list(range(50, 59))).cached_tokens == 8


def test_growing_beyond_the_pool_changes_nothing() -> None:
    """All or nothing."""
    pool = BlockPool(3, SIZE)
    lease = Lease("a")
    assert not pool.grow(lease, 4 * SIZE)
    assert (lease.blocks, pool.available) == ([], 3)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_block_is_ever_lost_or_in_two_places(data: st.DataObject) -> None:
    """Random rows that match, grow, publish and release, over few tokens so that texts collide; accounts always hold.

    A model of the memory beside it checks that a cached token is the token it is taken for.
    """
    pool = BlockPool(data.draw(st.integers(1, 12)), SIZE)
    memory: dict[tuple[int, int], int] = {}  # (block, offset) to the token written there
    rows: list[tuple[Lease, list[int], int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        if rows and data.draw(st.booleans()):
            lease, tokens, computed = rows.pop(data.draw(st.integers(0, len(rows) - 1)))
            if data.draw(st.booleans()) and computed < len(tokens) and pool.grow(lease, computed + 1):
                write(memory, lease, tokens, computed, computed + 1)
                pool.publish(lease, tokens[: computed + 1])
                rows.append((lease, tokens, computed + 1))
            else:
                pool.release(lease, tokens[:computed])
        else:
            salt = data.draw(st.sampled_from("ab"))
            tokens = [ord(salt), *data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=20))]
            match = pool.match(salt, tokens)
            if match.copy:
                source, target = match.copy
                memory |= {(target, at): token for (block, at), token in list(memory.items()) if block == source}
            rows.append((match.lease, tokens, match.cached_tokens))
        pool.check()
        for lease, tokens, computed in rows:
            for at in range(computed):
                assert memory[lease.blocks[at // SIZE], at % SIZE] == tokens[at]
    for lease, tokens, computed in rows:
        pool.release(lease, tokens[:computed])
    pool.check()
    assert pool.used == 0


def write(memory: dict[tuple[int, int], int], lease: Lease, tokens: list[int], first: int, end: int) -> None:
    for at in range(first, end):
        memory[lease.blocks[at // SIZE], at % SIZE] = tokens[at]
