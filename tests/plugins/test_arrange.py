"""The layout of quadratic_spec's next pass: its rule, its reference and its kernel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stand_ins.kernel_launch import INTERPRETED, MASK, as_array, launch_tensors

from nemodiff.config import ModelConfig
from nemodiff.contract import MAX_BLOCK, PAGE
from nemodiff.plugins.ops import arrange
from nemodiff.plugins.ops.arrange import Known, layout, packed, reached
from nemodiff.runtime.engines.grouping import Arrangement, Grouping

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

LOWEST = 300  # of the ids that passes predict


def written(seed: int, most: int) -> dict[str, Any]:
    """Inputs of the op: rows of a forward that follows one, of up to `most` tokens each."""
    rng = np.random.default_rng(seed)
    apart = 1024
    results = rng.integers(LOWEST, LOWEST + 9, 3 * apart).astype(np.int32)
    confidence = rng.choice(
        np.array([0, 0.01, 0.5, 0.9, 0.99, 1, np.nan], np.float32), apart, p=[0.02, 0.02, 0.1, 0.2, 0.3, 0.35, 0.01]
    )
    confidence *= rng.choice(np.array([1, 0.998], np.float32), apart)
    results[apart : 2 * apart] = confidence.view(np.int32)
    table = rng.permutation(5 * 40).reshape(5, 40).astype(np.int32) + 1
    known = list[np.ndarray]()
    begin = first = 0
    for row in rng.permutation(5)[: rng.integers(1, 5)].tolist():
        block = int(rng.integers(2, rng.choice([5, MAX_BLOCK + 1])))
        size = int(rng.integers(3, most + 1))
        heads = int(rng.integers(1, MAX_BLOCK + 1)) if rng.random() < 0.7 else 1
        agree = int(rng.integers(heads))
        results[2 * apart + begin + 1 :][:agree] = results[begin : begin + agree]
        at, groups = heads, dict[int, tuple[int, int]]()
        for number in rng.permutation(heads)[: rng.integers(4)].tolist() + ([agree] if rng.random() < 0.8 else []):
            groups[number + 1] = at, block
            at += block
        stops = [*range(2, 2 + rng.choice([0, 2, arrange.MOST_STOPS - 1])), LOWEST + int(rng.choice([1, 20]))]
        position = int(rng.integers(40 * PAGE - size - heads))
        fields = Known(first, size, block, row, position, heads, begin, apart + begin, 2 * apart + begin)
        known.append(packed(fields, stops, groups))
        begin += at
        first += size
    count = first + 5  # which are not its own
    return {
        **{name: rng.integers(0, 99, count).astype(np.int32) for name in ("ids", "pos", "slot")},
        "visible": rng.integers(0, 99, (count, 3)).astype(np.int32),
        "adapter": rng.random(count).astype(np.float32),
        "known": np.stack(known),
        "results": results,
        "page_table": table,
    }


NAMES = ("ids", "pos", "slot", "visible", "adapter")


@example(0, 65)  # the last of as many stop ids as there may be
@example(13, 65)  # one token is left
@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([5, 40, 64, 65, 300]))
def test_the_kernel_does_what_the_reference_says(tiny: ModelConfig, seed: int, most: int) -> None:
    given = written(seed, most)
    given["known"] = np.concatenate([given["known"], np.zeros_like(given["known"][:1])])  # a row of no tokens
    expected = arrange.reference(**given, mask=MASK)
    _, kernel = launch_tensors(arrange.OP, tiny, **{name: array.copy() for name, array in given.items()})
    for name, wanted in zip(NAMES, expected, strict=True):
        np.testing.assert_array_equal(as_array(kernel[name]), wanted, name)


def test_the_host_arranges_what_the_device_does() -> None:
    """Where it does not, the pass is dropped and begun again: slower, with the same tokens."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        heads, block, size = int(rng.integers(1, 9)), int(rng.integers(2, 7)), int(rng.integers(arrange.SMALLEST, 40))
        before = Grouping(heads, {int(n) + 1: block for n in rng.permutation(heads)[: rng.integers(5)]})
        count, position = before.tokens, int(rng.integers(99))
        token, stops = rng.integers(LOWEST, LOWEST + 9, count).astype(np.int32), (2, LOWEST + 1)
        confidence = rng.choice(np.array([0.5, 0.9, 0.99, 1], np.float32), count)
        accepted = int(rng.integers(heads)) + 1
        next_ids = np.append(token[0], token[: accepted - 1])
        next_ids = np.append(next_ids, np.full(count - accepted, LOWEST - 1)).astype(np.int32)
        known = packed(Known(0, size, block, 0, position, heads, 0, count, 2 * count), stops, before.places)
        ids, pos, _, visible, adapter = arrange.reference(
            *(np.zeros((size, *more), np.int32) for more in ((), (), (), (3,), ())),
            known[None], np.concatenate([token, confidence.view(np.int32), next_ids]), np.zeros((1, 9), np.int32), MASK,
        )  # fmt: skip
        got = Arrangement(before, size, block, stops, MASK).after(token, confidence, accepted, position + accepted)
        for name, wanted in (("ids", ids), ("pos", pos), ("visible", visible), ("adapter", adapter)):
            np.testing.assert_array_equal(getattr(got, name), wanted, name)


def test_passes_of_all_kinds_are_met() -> None:
    """By what the test above draws: drafts of all lengths, numbers without a group, groups cut short, tokens left."""
    met = set[str]()
    for seed in range(60):
        given = written(seed, 300)
        ids, _, slot, visible, adapter = arrange.reference(**given, mask=MASK)
        for fields in given["known"]:
            row = Known(*fields[: len(Known._fields)].tolist())
            own = slice(row.first, row.first + row.size)
            masks = ids[own] == MASK
            heads = int((visible[own, 0] > visible[own, 1]).sum())
            np.testing.assert_array_equal(masks, adapter[own] == 1)
            assert len(set(slot[own].tolist())) == row.size
            left = row.size - heads - int(masks.sum())
            met |= {"a draft" if heads > 1 else "no draft", "all used" if not left else "some left"}
            met |= {"short" for size in layout([2**15] * 5, row.size, row.block)[1].values() if size < row.block}
            met |= {"three groups"} if masks.sum() > 2 * row.block else set()
    assert met == {"a draft", "no draft", "all used", "some left", "short", "three groups"}


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1, width=32), max_size=MAX_BLOCK - 1), st.integers(3, 300), st.integers(2, MAX_BLOCK))
def test_a_layout_takes_the_likeliest(confidence: list[float], size: int, block: int) -> None:
    chances = reached(confidence)
    heads, groups = layout(chances, size, block)
    assert 1 <= heads <= len(chances)
    assert heads == 1 or (chances[heads - 1] >= arrange.LEAST and heads + block <= size)
    assert sorted(chances, reverse=True) == chances
    if len(groups) < heads:  # no room for another
        assert size - heads - sum(groups.values()) < 2
    *full, last = groups.values()
    assert set(full) <= {block}
    assert 2 <= last <= block
    of_number = {n: chances[n - 1] - (chances[n] if n < heads else 0) for n in range(1, heads + 1)}
    order = [(-of_number[number], number) for number in groups]
    assert order == sorted(order)
    assert all(of_number[one] >= of_number[other] for one in groups for other in set(of_number) - set(groups))


def test_chances_are_fixed_point_numbers() -> None:
    """The same everywhere: each is cut after 15 bits."""
    assert reached([]) == [2**15]
    assert reached([1.0, 0.5, float(np.float32(0.99)), float("nan"), 1.0]) == [2**15, 2**15, 2**14, 16220, 0, 0]
    assert reached([2.0, -1.0]) == [2**15, 2**15, 0]


@pytest.mark.parametrize(
    ("chances", "size", "block", "expected"),
    [
        ([1.0], 64, 8, (1, {1: 8})),  # tokens are left over
        ([1.0, 0.9], 11, 8, (2, {2: 8})),  # one is too few for a group
        ([1.0, 0.9], 12, 8, (2, {2: 8, 1: 2})),
        ([1.0, 0.5], 18, 8, (2, {1: 8, 2: 8})),  # equals
        ([1.0, 0.9, 0.8], 10, 8, (2, {2: 8})),  # a group has room
        ([1.0, 0.9, 0.04], 40, 8, (2, {2: 8, 1: 8})),  # not worth a look
        ([1.0, 0.9, 0.8], 4, 8, (1, {1: 3})),
    ],
)
def test_layouts(chances: list[float], size: int, block: int, expected: Any) -> None:
    heads, groups = layout([int(chance * 2**15) for chance in chances], size, block)
    assert (heads, list(groups.items())) == (expected[0], list(expected[1].items()))
    assert list(itertools.accumulate(groups.values(), initial=heads))[-1] <= size
