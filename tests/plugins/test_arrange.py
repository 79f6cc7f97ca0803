"""The layout of quadratic_spec's next passes: its rule, its reference and its kernels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import INTERPRETED, MASK, as_array, launch_tensors

from nemodiff.config import ModelConfig
from nemodiff.contract import MAX_BLOCK, PAGE
from nemodiff.plugins.ops import arrange
from nemodiff.plugins.ops.arrange import BITS, PRICES, RATE_BITS, Drafts, Known, Lengths, packed, reached
from nemodiff.runtime.engines.grouping import Arrangement, Grouping
from nemodiff.runtime.engines.passes import Following, Prediction, causal
from nemodiff.runtime.engines.passes import arrange as arranged

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

LOWEST = 300  # of the ids that passes predict


def drawn_lengths(rng: np.random.Generator) -> Lengths:
    """Lengths of groups, from none to as many as there may be."""
    count = int(rng.integers(0, arrange.MOST_LENGTHS + 1))
    sizes = np.sort(rng.choice(np.arange(2, MAX_BLOCK + 1), count, replace=False)).tolist()
    return tuple(zip(sizes, np.sort(rng.integers(2**RATE_BITS, 6 * 2**RATE_BITS, count)).tolist(), strict=True))


def written(seed: int, budget: int) -> dict[str, Any]:
    """Inputs of the op: rows that follow others, and share so many tokens behind four of other rows."""
    rng = np.random.default_rng(seed)
    apart = 2048
    results = rng.integers(LOWEST, LOWEST + 9, 3 * apart).astype(np.int32)
    confidence = rng.choice(
        np.array([0, 0.01, 0.5, 0.9, 0.99, 1, np.nan], np.float32), apart, p=[0.02, 0.02, 0.1, 0.2, 0.3, 0.35, 0.01]
    )
    confidence *= rng.choice(np.array([1, 0.998], np.float32), apart)
    results[apart : 2 * apart] = confidence.view(np.int32)
    table = rng.permutation(9 * 40).reshape(9, 40).astype(np.int32) + 1
    known = list[list[int]]()
    begin = 0
    for row in rng.permutation(9)[: rng.integers(1, min(budget, 9) + 1)].tolist():
        heads = int(rng.integers(1, MAX_BLOCK + 1)) if rng.random() < 0.7 else 1
        agree = int(rng.integers(heads))
        results[2 * apart + begin + 1 :][:agree] = results[begin : begin + agree]
        at, groups = heads, dict[int, tuple[int, int]]()
        for number in rng.permutation(heads)[: rng.integers(2)].tolist() + ([agree] if rng.random() < 0.8 else []):
            masks = int(rng.integers(1, MAX_BLOCK + 1))
            groups[number + 1] = at, masks
            at += masks
        at = min(at, apart - begin)
        stops = [*range(2, 2 + rng.choice([0, 2, arrange.MOST_STOPS - 1])), LOWEST + int(rng.choice([1, 20]))]
        most = int(rng.choice([MAX_BLOCK, 256]))
        position = int(rng.integers(40 * PAGE - most - heads))
        fields = Known(4, budget, most, row, position, heads, begin, apart + begin, 2 * apart + begin)
        known.append(packed(fields, drawn_lengths(rng), stops, groups))
        begin = min(begin + at, apart - 4 * MAX_BLOCK)
    count = 4 + budget + int(rng.integers(9))
    return {
        **{name: rng.integers(0, 99, count).astype(np.int32) for name in ("ids", "pos", "slot", "row", "first")},
        "visible": rng.integers(0, 99, (count, 3)).astype(np.int32),
        "adapter": rng.random(count).astype(np.float32),
        "known": np.array(known, np.int32),
        "results": results,
        "page_table": table,
    }


NAMES = ("ids", "pos", "slot", "row", "first", "visible", "adapter")


@example(3, 900)  # nine rows: more than the kernel looks at at once
@settings(max_examples=12)
@given(st.integers(0, 2**32), st.sampled_from([1, 5, 40, 64, 300, 900]))
def test_the_kernels_do_what_the_reference_says(tiny: ModelConfig, seed: int, budget: int) -> None:
    given = written(seed, budget)
    expected = arrange.reference(**given, mask=MASK)
    _, kernel = launch_tensors(arrange.OP, tiny, **{name: array.copy() for name, array in given.items()})
    for name, wanted in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(as_array(kernel[name]), wanted, name)


@pytest.mark.parametrize("budget", [110, 115, 163])
def test_the_kernels_at_borders(tiny: ModelConfig, budget: int) -> None:
    """More rows than are looked at at once; one exactly fits; equal chances are cut; nothing is left to a row."""
    apart, at, known = 400, 0, list[list[int]]()
    results = np.full((3, apart), LOWEST, np.int32)
    for row, confidence in enumerate([[1.0] * (MAX_BLOCK - 1), *[[0.5]] * 7, [0.9, 0.5, 0.5], [0.8]]):
        masks = 1 + len(confidence)
        results[1, at + 2 : at + 1 + masks] = np.array(confidence, np.float32).view(np.int32)
        fields = Known(0, budget, 256, row, 10, 1, at, apart + at, 2 * apart + at)
        known.append(packed(fields, ((4, 300), (8, 500)), (2,), {1: (1, masks)}))
        at += 1 + masks
    given = {name: np.zeros(budget, np.int32) for name in NAMES[:5]}
    given |= {"visible": np.zeros((budget, 3), np.int32), "adapter": np.zeros(budget, np.float32)}
    given |= {"known": np.array(known, np.int32), "results": results.ravel()}
    given["page_table"] = np.arange(9 * len(known), dtype=np.int32).reshape(-1, 9)
    expected = arrange.reference(**given, mask=MASK)
    _, kernel = launch_tensors(arrange.OP, tiny, **{name: array.copy() for name, array in given.items()})
    for name, wanted in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(as_array(kernel[name]), wanted, name)


def test_the_host_arranges_what_the_device_does() -> None:
    """Where it does not, the pass is dropped and begun again: slower, with the same tokens."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        budget, stops, apart = int(rng.integers(12, 150)), (2, LOWEST + 1), 300
        passes, given, known = list[Following](), list[Prediction](), list[list[int]]()
        results = np.zeros((3, apart), np.int32)
        at = 0
        for row in range(rng.integers(1, 4)):
            heads, position, lengths = int(rng.integers(1, 9)), int(rng.integers(99)), drawn_lengths(rng)
            numbers = sorted(rng.permutation(heads)[: rng.integers(5)].tolist())
            before = Grouping(heads, {number + 1: int(rng.integers(2, 7)) for number in numbers})
            count, accepted = before.tokens, int(rng.integers(heads)) + 1
            token = rng.integers(LOWEST, LOWEST + 9, count).astype(np.int32)
            confidence = rng.choice(np.array([0.5, 0.9, 0.99, 1], np.float32), count)
            next_ids = np.full(count, LOWEST - 1, np.int32)
            next_ids[1:accepted] = token[: accepted - 1]
            results[:, at : at + count] = token, confidence.view(np.int32), next_ids
            passes.append(Following(causal("verify", [1], position), Arrangement(before, lengths, 256, stops, MASK)))
            given.append(Prediction(token, confidence, next_ids, None))
            fields = Known(0, budget, 256, row, position, heads, at, apart + at, 2 * apart + at)
            known.append(packed(fields, lengths, stops, before.places))
            at += count
        fields_of_tokens = [np.zeros((budget, *more), np.int32) for more in ((), (), (), (), (), (3,), ())]
        table = np.zeros((3, 9), np.int32)
        device = arrange.reference(*fields_of_tokens, np.array(known, np.int32), results.ravel(), table, MASK)
        begin = 0
        for following, prediction, row in zip(passes, given, arranged(passes, given, budget), strict=True):
            p = following.after(prediction, row)
            ids, pos, _, _, first, visible, adapter = (array[begin : begin + p.ids.size] for array in device)
            for array, wanted in ((p.ids, ids), (p.pos, pos), (p.visible, visible), (p.adapter, adapter)):
                np.testing.assert_array_equal(array, wanted)
            assert set(first.tolist()) == {begin}
            begin += p.ids.size


def test_rows_of_no_tokens_write_nothing(tiny: ModelConfig) -> None:
    """As a warm-up has them, which compiles the kernels."""
    given = written(1, 8)
    given["known"] = np.zeros((3, arrange.WIDTH), np.int32)
    expected = dict(zip(NAMES, arrange.reference(**given, mask=MASK), strict=True))
    _, kernel = launch_tensors(arrange.OP, tiny, **{name: array.copy() for name, array in given.items()})
    for name in NAMES:
        wanted = np.zeros_like(given[name]) if name == "first" else given[name]  # all is left over
        np.testing.assert_array_equal(as_array(kernel[name]), wanted, name)
        np.testing.assert_array_equal(expected[name], wanted, name)


def test_passes_of_all_kinds_are_met() -> None:
    """By what the kernels are tested with: drafts and none, groups of several lengths, tokens left over and none."""
    met = set[str]()
    for seed in range(40):
        given = written(seed, 300)
        ids, pos, slot, row, first, visible, adapter = arrange.reference(**given, mask=MASK)
        begins, end = np.unique(first[4:], return_index=True)[0].tolist(), len(given["known"])
        for begin, following in zip(begins[:end], [*begins[1:], len(ids)], strict=False):
            own = slice(begin, following)
            masks = ids[own] == MASK
            heads = int((visible[own, 0] > visible[own, 1]).sum())
            np.testing.assert_array_equal(masks, adapter[own] == 1)
            assert len(set(row[own].tolist())) == 1
            assert len(set(slot[own].tolist())) == following - begin
            assert (pos[own][:heads] == pos[begin] + np.arange(heads)).all()
            groups = np.unique(visible[own][masks][:, 1:], axis=0)
            met |= {"a draft" if heads > 1 else "no draft", f"{min(len(groups), 3)} groups"}
            met |= {"lengths"} if len({int(to - of) for of, to in groups}) > 1 else set()
        met |= {"all used" if begins[end:] == [] else "some left"}
    assert met == {
        "a draft",
        "no draft",
        "0 groups",
        "1 groups",
        "2 groups",
        "3 groups",
        "lengths",
        "all used",
        "some left",
    }


# --- the rule, once more in plain Python


def wanted(chances: Sequence[int], lengths: Lengths, head: int, mask: int) -> tuple[int, list[int], list[int]]:
    """What one row wants where a head and a mask have these prices: heads, masks by number, and numbers' chances."""
    heads = 1
    while heads < len(chances) and chances[heads] >= head:
        heads += 1
    of_number = [*map(operator.sub, chances[: heads - 1], chances[1:heads]), chances[heads - 1]]
    masks = [max((size for size, rate in lengths if chance * 256 >= rate * mask), default=0) for chance in of_number]
    return heads, masks, of_number


def layouts(rows: Sequence[tuple[list[int], Lengths]], most: int, budget: int) -> list[tuple[int, list[int]]]:
    """Heads and masks of each row."""

    def size(row: tuple[list[int], Lengths], head: int, mask: int) -> int:
        heads, masks, _ = wanted(*row, head, mask)
        return min(heads + sum(masks), most)

    at, end = 0, len(PRICES)
    while end - at > 1:  # by halves: where a head more cuts a group, a lower price may take fewer tokens
        middle = (at + end) // 2
        fits = sum(size(row, PRICES[middle], PRICES[middle]) for row in rows) <= budget
        at, end = (middle, end) if fits else (at, middle)
    price, lower = PRICES[at], PRICES[min(at + 1, len(PRICES) - 1)]
    left = budget - sum(size(row, price, price) for row in rows)
    made = []
    for row in rows:
        before, more = size(row, price, price), max(size(row, lower, lower) - size(row, price, price), 0)
        prices = (lower if more <= left else price), (lower if left >= 0 else price)
        room = min(size(row, *prices), before + max(left, 0))
        left -= more
        heads, masks, of_number = wanted(*row, *prices)
        room -= heads
        for number in sorted(range(heads), key=of_number.__getitem__, reverse=True):
            masks[number] = min(masks[number], room)
            room -= masks[number]
        made.append((heads, masks))
    return made


CONFIDENCE = st.lists(st.sampled_from([1.0, 0.99, 0.95, 0.8, 0.5, 0.1, 0.0]), max_size=MAX_BLOCK - 1)
LENGTHS = st.lists(st.tuples(st.integers(2, MAX_BLOCK), st.integers(256, 4000)), max_size=arrange.MOST_LENGTHS).map(
    lambda pairs: tuple(zip(*map(sorted, zip(*dict(pairs).items(), strict=True)), strict=True)) if pairs else ()
)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(CONFIDENCE.map(reached), LENGTHS), min_size=1, max_size=12), st.integers(0, 900), st.booleans()
)
def test_rows_share_a_budget(rows: list[tuple[list[int], Lengths]], more: int, short: bool) -> None:
    most, budget = (MAX_BLOCK if short else 256), len(rows) + more
    made = Drafts.of([chances for chances, _ in rows], [lengths for _, lengths in rows], [most] * len(rows)).layouts(
        budget
    )
    expected = layouts(rows, most, budget)
    for heads, masks, (chances, _), (wanted_heads, wanted_masks) in zip(
        made.heads.tolist(), made.masks.tolist(), rows, expected, strict=True
    ):
        assert (heads, masks[:heads]) == (wanted_heads, wanted_masks)
        assert not any(masks[heads:])
        assert heads <= len(chances)
        assert heads + sum(masks) <= most
    assert made.heads.sum() + made.masks.sum() <= budget


def test_chances_are_fixed_point_numbers() -> None:
    """The same everywhere: each is cut after 15 bits."""
    assert reached([]) == [2**15]
    assert reached([1.0, 0.5, float(np.float32(0.99)), float("nan"), 1.0]) == [2**15, 2**15, 2**14, 16220, 0, 0]
    assert reached([2.0, -1.0]) == [2**15, 2**15, 0]


def test_prices_halve_every_other_step() -> None:
    assert PRICES[0] > 2**BITS == PRICES[1]  # more than any chance
    assert [2 * price for price in PRICES[2:]] == pytest.approx(PRICES[:-2], abs=1)


EIGHT = ((8, 256),)  # a mask of a group that is met for certain brings one token


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [
        ([[1.0]], 64, [(1, {1: 8})]),  # tokens are left over
        ([[1.0, 0.9]], 10, [(2, {2: 8})]),
        ([[1.0, 0.9]], 14, [(2, {1: 4, 2: 8})]),  # the less likely one is cut
        ([[1.0, 0.5]], 13, [(1, {1: 8})]),  # a head is there with what its price brings, or not at all
        ([[1.0, 0.9, 0.004]], 60, [(2, {1: 8, 2: 8})]),  # cheaper than all prices
        ([[1.0], [1.0]], 2, [(1, {}), (1, {})]),
        ([[1.0], [1.0]], 12, [(1, {1: 8}), (1, {1: 2})]),  # the first one has room
        ([[1.0, 1.0], [1.0, 0.1]], 11, [(2, {2: 8}), (1, {})]),
    ],
)
def test_layouts(rows: list[list[float]], budget: int, expected: Any) -> None:
    chances = [[int(chance * 2**15) for chance in row] for row in rows]
    made = Drafts.of(chances, [EIGHT] * len(rows), [256] * len(rows)).layouts(budget)
    groups = [{n: size for n, size in enumerate(row, 1) if size} for row in made.masks.tolist()]
    assert list(zip(made.heads.tolist(), groups, strict=True)) == expected
