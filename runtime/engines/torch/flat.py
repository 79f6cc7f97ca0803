"""A forward as flat tokens: the tokens of all its rows one after the other, whatever their number, mode or length.

A graph is captured for a number of tokens and of predictions alone, so those are rounded up; the tokens that this adds
write to the scratch page and see one slot of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ....contract import MAX_BLOCK, PAGE, PREFILL_CHUNK, Binding
from ....engine_info import EngineInfo
from ....plugins.ops.arrange import SMALLEST, WIDTH, Known, packed
from ..grouping import Arrangement
from ..layout import Layout, layout
from ..pages import Pages
from ..passes import Feed, Pass

MOST_CAPTURED = 1024  # tokens of a graph
FREE = 256  # up to so many tokens a pass takes the time of its weights, so padding costs nothing (docs/design.md)


_ALONE = PREFILL_CHUNK + MAX_BLOCK  # a chunk of a prompt with a block of masks, which every answer may begin with


class Source(NamedTuple):
    """What feeds a pass: where the predictions of the one before it lie among the results of the forward before."""

    feed: Feed | None  # None: nothing does
    tokens: int  # where they begin
    next_ids: int
    size: int


class FlatShape(NamedTuple):
    """What decides the buffers and the graph of a forward."""

    tokens: int  # N
    predicted: int  # R
    logits: bool = False  # whether a row wants its logits on the host
    sampled: bool = False  # whether a row is sampled on the device
    embedded: bool = False  # whether a token has another embedding than its id's


# Letters: N tokens, R predictions. `row` is a row of the page table, `first` the number of its first token here;
# `span` are the first and last predictions of a row, among which the commit rule chooses.
_TOKENS = (
    Binding("ids", "i32", ("N",)),
    Binding("pos", "i32", ("N",)),
    Binding("slot", "i32", ("N",)),
    Binding("row", "i32", ("N",)),
    Binding("first", "i32", ("N",)),
    Binding("visible", "i32", ("N", 3)),
    # Only for a forward that is begun ahead: see `plugins/ops/advance.py`.
    Binding("source", "i32", ("N",)),
    Binding("verified", "i32", ("N", 3)),
    Binding("known", "i32", ("K", WIDTH)),  # see `plugins/ops/arrange.py`
)
_PREDICTIONS = (
    Binding("index", "i32", ("R",)),
    Binding("span", "i32", ("R", 2)),
    Binding("threshold", "f32", ("R",)),
)
_SAMPLING = (
    Binding("temperature", "f32", ("R",)),
    Binding("seed", "i32", ("R", 2)),
)
_OUTPUTS = (
    Binding("token", "i32", ("R",)),
    Binding("confidence", "f32", ("R",)),
    Binding("next_ids", "i32", ("R",)),
)


def flat_layouts(shape: FlatShape, info: EngineInfo) -> tuple[Layout, Layout]:
    """The layouts of the inputs and of the outputs of a forward."""
    bindings = list(_TOKENS)
    if info.has_adapter:
        bindings.append(Binding("adapter", "f32", ("N",)))
    if shape.embedded:  # as in `contract.inputs`
        bindings += [Binding("embedding", "i32", ("N",)), Binding("embeddings", "f32", ("N", "E"))]
    bindings += [*_PREDICTIONS, *(_SAMPLING if shape.sampled or shape.logits else ())]
    lengths = {"N": shape.tokens, "K": shape.tokens // SMALLEST, "R": shape.predicted, "E": info.model.hidden_size}
    return layout(bindings, lengths), layout(_OUTPUTS, lengths)


def flat_shape(passes: Sequence[Pass]) -> FlatShape:
    """The exact shape of a forward."""
    return FlatShape(
        sum(p.ids.size for p in passes),
        max(1, sum(p.predicted.size for p in passes)),
        logits=any(p.logits for p in passes),
        sampled=any(p.temperature for p in passes),
        embedded=any(p.embedded is not None for p in passes),
    )


def rounded_tokens(count: int) -> int:
    """The next size that graphs are made for: powers of two, then in quarters between them and in steps of 64."""
    if count <= FREE:
        return 1 << (count - 1).bit_length()
    if PREFILL_CHUNK < count <= _ALONE:
        return _ALONE
    step = max(64, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def _rounded_predictions(tokens: int) -> list[int]:
    """How many predictions graphs of so many tokens are made for."""
    fewer = (MAX_BLOCK, FREE) if tokens <= _ALONE else (FREE,)
    return [*(size for size in fewer if size < tokens), tokens]


@functools.lru_cache(maxsize=1024)
def rounded_shape(shape: FlatShape) -> FlatShape:
    """The shape that runs a forward where there are graphs.

    Where a row is sampled, wants its logits or has an image, all that is made ready, for few predictions at least: the
    kernels make the same of other rows with it and without.
    """
    tokens = rounded_tokens(max(shape.tokens, shape.predicted, MAX_BLOCK if shape.embedded else 1))
    predicted = next(size for size in _rounded_predictions(tokens) if size >= shape.predicted)
    sampled = shape.sampled or shape.logits or shape.embedded
    logits = sampled if predicted <= FREE else shape.logits
    return shape._replace(tokens=tokens, predicted=predicted, sampled=sampled, logits=logits)


def graph_shapes(most_tokens: int, *, images: bool = False) -> list[FlatShape]:
    """What is captured, the largest first: later graphs fit into the memory of the first.

    Forwards of every size, of greedy rows alone and of any rows, if the model sees `images` with embeddings too. Others
    run eagerly: those of more than MOST_CAPTURED tokens, which compute for longer than they are launched, and more
    logits than FREE, which take longer to the host.
    """
    most = min(most_tokens, MOST_CAPTURED)
    shapes: dict[FlatShape, None] = {}
    for size in sorted({rounded_tokens(count) for count in range(1, most + 1)}, reverse=True):
        for predicted in _rounded_predictions(size):
            plain = FlatShape(size, predicted)
            for shape in (plain, plain._replace(sampled=True), *([plain._replace(embedded=True)] if images else [])):
                shapes[rounded_shape(shape)] = None
    return list(shapes)


def is_arranged(source: Source) -> bool:
    """Whether the device arranges a pass."""
    return isinstance(source.feed, Arrangement)


def fill(
    arrays: Mapping[str, np.ndarray],
    passes: Sequence[Pass],
    rows: Sequence[int],
    pages: Pages,
    mask: int,
    sources: Sequence[Source] | None = None,
) -> None:
    """Write the inputs of a forward; `sources` feed its passes, if it is begun ahead.

    Passes that are arranged come last, and have all tokens and predictions that the others leave.
    """
    if "embedding" in arrays:
        arrays["embedding"][:] = -1
    fixed = len(passes) - sum(map(is_arranged, sources or ()))
    others = passes[:fixed]
    places = _places(tuple([p.ids.size for p in others]), tuple([p.predicted.size for p in others]))
    if fixed:
        _fill_tokens(arrays, others, rows[:fixed], pages, places)
        _fill_predictions(arrays, others, mask, places)
    tokens, predictions = places.first.size, places.start.size
    _pad(arrays, tokens, predictions, mask)
    if sources is None:
        return
    arrays["source"][:] = -1
    arrays["verified"][:] = 0
    if fixed:
        _fill_sources(arrays, sources[:fixed], places)
    if fixed < len(passes):
        budget = room(FlatShape(len(arrays["ids"]), len(arrays["index"])), passes, sources)
        arrays["index"][predictions : predictions + budget] = np.arange(tokens, tokens + budget)
        work = zip(passes[fixed:], rows[fixed:], sources[fixed:], strict=True)
        arrays["known"][: len(passes) - fixed] = [_known(tokens, budget, *each) for each in work]


def room(shape: FlatShape, passes: Sequence[Pass], sources: Sequence[Source]) -> int:
    """The tokens that passes have together which are arranged, all of them predicted."""
    fixed = [p for p, source in zip(passes, sources, strict=True) if not is_arranged(source)]
    return min(shape.tokens - sum(p.ids.size for p in fixed), shape.predicted - sum(p.predicted.size for p in fixed))


class _Places(NamedTuple):
    """Where the tokens and predictions of passes stand, all i32."""

    sizes: np.ndarray  # (B,): tokens of each pass
    counts: np.ndarray  # (B,): predictions
    first: np.ndarray  # (N,): the first token of a token's pass
    offset: np.ndarray  # (N,): how many of the pass stand before it
    start: np.ndarray  # (R,): the first token of a prediction's pass
    span: np.ndarray  # (R, 2): the pass's first prediction, and the end of them


@functools.lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...], counts: tuple[int, ...]) -> _Places:
    """The places of passes of these sizes, which come again and again."""
    tokens, predictions = np.array(sizes, np.int32), np.array(counts, np.int32)
    starts, ends = tokens.cumsum(dtype=np.int32) - tokens, predictions.cumsum(dtype=np.int32)
    first = starts.repeat(tokens)
    span = np.stack([ends - predictions, ends], axis=1).repeat(predictions, axis=0)
    offset = np.arange(first.size, dtype=np.int32) - first
    return _Places(tokens, predictions, first, offset, starts.repeat(predictions), span)


# What all passes have is written at once, since calls of numpy are what takes the time.
def _fill_tokens(
    arrays: Mapping[str, np.ndarray], passes: Sequence[Pass], rows: Sequence[int], pages: Pages, places: _Places
) -> None:
    """Write what each token has."""
    count = places.first.size
    np.concatenate([p.ids for p in passes], out=arrays["ids"][:count])
    np.concatenate([p.pos for p in passes], out=arrays["pos"][:count])
    np.concatenate([p.visible for p in passes], out=arrays["visible"][:count])
    row, begin = np.array([rows, [p.write_at for p in passes]], np.int32).repeat(places.sizes, axis=1)  # (N,)
    arrays["row"][:count] = row
    arrays["first"][:count] = places.first
    arrays["slot"][:count] = pages.slots_of(row, begin + places.offset)
    at = 0
    for p in passes:
        if "adapter" in arrays:
            arrays["adapter"][at : at + p.ids.size] = p.adapter
        if p.embedded is not None:
            arrays["embedding"][at + p.embedded] = at + p.embedded
            arrays["embeddings"][at + p.embedded] = p.embeddings
        at += p.ids.size


def _fill_predictions(arrays: Mapping[str, np.ndarray], passes: Sequence[Pass], mask: int, places: _Places) -> None:
    """Write what each prediction has, after the tokens."""
    count, counts = places.start.size, places.counts
    index = arrays["index"][:count]
    np.concatenate([p.predicted for p in passes], out=index)
    index += places.start
    arrays["span"][:count] = places.span
    arrays["threshold"][:count] = np.array([p.threshold for p in passes]).repeat(counts)
    if "seed" in arrays:
        masked = arrays["ids"][index] == mask
        heats = np.array([[p.mask_temperature for p in passes], [p.temperature for p in passes]])
        arrays["temperature"][:count] = np.where(masked, *heats.repeat(counts, axis=1))
        seeds = np.array([p.seed for p in passes], np.uint64).view(np.int32).reshape(-1, 2)
        arrays["seed"][:count] = seeds.repeat(counts, axis=0)


def _fill_sources(arrays: Mapping[str, np.ndarray], sources: Sequence[Source], places: _Places) -> None:
    """Write where each token's id comes from, and what its place depends on."""
    moves = [(s.tokens, s.next_ids, s.size) if s.feed == "accepted" else (0, 0, 0) for s in sources]
    of_passes = np.array([(*_fed_ids(s), *move) for s, move in zip(sources, moves, strict=True)], np.int32)
    of_tokens = of_passes.repeat(places.sizes, axis=0)  # (N, 5)
    count, (begin, fed) = len(of_tokens), of_tokens[:, :2].T
    arrays["source"][:count] = np.where(places.offset < fed, begin + places.offset, -1)
    arrays["verified"][:count] = of_tokens[:, 2:]


def _fed_ids(source: Source) -> tuple[int, int]:
    """Where the ids that a pass begins with lie among the results, and how many they are at most."""
    match source.feed:
        case "next_ids":
            return source.next_ids, source.size
        case "token":
            return source.tokens + source.size - 1, 1
        case "accepted":
            return source.tokens, 1
    return 0, 0


def _known(first: int, budget: int, p: Pass, row: int, source: Source) -> list[int]:
    """What a pass follows from that is arranged, as `plugins/ops/arrange.py` has it."""
    assert isinstance(source.feed, Arrangement)
    before, lengths, most, stops, _ = source.feed
    results = source.tokens, (source.tokens + source.next_ids) // 2, source.next_ids  # confidences lie between
    return packed(Known(first, budget, most, row, p.write_at, before.heads, *results), lengths, stops, before.places)


def _pad(arrays: Mapping[str, np.ndarray], at: int, begin: int, mask: int) -> None:
    """Fill what is left after the passes' tokens and predictions."""
    ids, index = arrays["ids"], arrays["index"]
    if at < ids.size:
        offset = np.arange(at, ids.size, dtype=np.int32) % PAGE
        ids[at:] = int(mask == 0)  # any id but the mask
        arrays["pos"][at:] = 0
        arrays["slot"][at:] = offset
        arrays["row"][at:] = 0
        arrays["first"][at:] = at
        arrays["visible"][at:] = np.stack([np.zeros_like(offset), offset, offset + 1], axis=1)
        if "adapter" in arrays:
            arrays["adapter"][at:] = 0
    if begin < index.size:
        own = np.arange(begin, index.size, dtype=np.int32)
        index[begin:] = ids.size - 1
        arrays["span"][begin:] = np.stack([own, own + 1], axis=1)
        arrays["threshold"][begin:] = 0
        if "seed" in arrays:
            for name in ("temperature", "seed"):
                arrays[name][begin:] = 0
