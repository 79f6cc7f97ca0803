"""Which prefixes are kept, and what of them a prompt is given."""

from __future__ import annotations

from nemodiff.runtime.batching.prefix_cache import SHORTEST, PrefixCache

IDS = list(range(40))


def kept(*prefixes: list[int]) -> PrefixCache:
    """Rows 4 and 5, of which each prefix takes one."""
    cache = PrefixCache(4, 2)
    assert [cache.keep(ids) for ids in prefixes] == [4, 5][: len(prefixes)]
    return cache


def test_a_prefix_is_given_from_its_shortest_length_on() -> None:
    cache = kept(IDS)
    assert cache.find([*IDS[: SHORTEST - 1], 99]) == (0, 0)
    assert cache.find([*IDS[:SHORTEST], 99]) == (4, SHORTEST)
    assert cache.keep([99, *IDS[: SHORTEST - 2]]) is None
    assert cache.keep([99, *IDS[: SHORTEST - 1]]) == 5
    assert (cache.count, cache.tokens, cache.longest) == (2, 40 + SHORTEST, 40)


def test_the_one_that_shares_the_most_is_given() -> None:
    cache = kept([*IDS[:18], *range(100, 119)], [*IDS[:20], *range(200, 221)])
    assert cache.find(IDS) == (5, 20)
    assert cache.find([*IDS[:18], 100]) == (4, 19)


def test_what_extends_a_prefix_takes_its_place_and_what_it_holds_is_not_kept() -> None:
    cache = kept(IDS[:20])
    assert cache.keep(IDS) == 4
    assert cache.keep(IDS) is None
    assert cache.keep([*IDS[:20], *[99] * 20]) is None  # half of it is there
    assert cache.keep([*IDS[:20], *[99] * 21]) == 5
    assert (cache.count, cache.tokens) == (2, 81)


def test_the_least_recently_used_makes_room() -> None:
    others = [[n] * SHORTEST for n in (50, 60, 70, 80)]
    cache = kept(IDS, others[0])
    cache.find(IDS)
    assert cache.keep(others[1]) == 5
    assert cache.keep(others[2]) == 4
    assert cache.keep([*others[1], 0]) == 5
    assert cache.keep(others[3]) == 4
    assert PrefixCache(4, 0).keep(IDS) is None


def test_a_row_that_is_forgotten_is_free() -> None:
    cache = kept(IDS, [50] * 20)
    cache.forget(4)
    assert (cache.count, cache.find(IDS)) == (1, (0, 0))
    assert cache.find([50] * 20) == (5, 20)
    cache.forget(5)
    assert [cache.keep(ids) for ids in (IDS, [50] * 20)] == [4, 5]
