"""Attention over pages and small ops in plain torch: what runs without the kernels, and what they must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ....contract import MAX_BLOCK, PAGE
from ....plugins.ops import arrange as arrangement
from .stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class View(NamedTuple):
    """Tokens `begin` to `end` of a pass, all of one row, and its first `pages` pages, which hold all that they see."""

    begin: int
    end: int
    row: int
    pages: int


class Sight(NamedTuple):
    """The same on the device; without pages they look at the whole pool."""

    begin: int
    end: int
    pages: Tensor | None  # (m,) i32
    mask: Tensor  # additive, (n, slots) compute


def sights(
    inputs: Mapping[str, Tensor], table: Tensor, pages: int, views: Sequence[View] | None, dtype: torch.dtype
) -> list[Sight]:
    """What each token looks at, the same in every layer.

    With views each row looks at its own pages. Without, for a graph, which must not depend on a row's length, every
    token looks at all pages of the pool, and at a slot only if its row has it where the token may look.
    """
    import torch

    visible = inputs["visible"]
    if views is not None:
        made = []
        for view in views:
            slots = torch.arange(view.pages * PAGE, device=table.device)
            mask = _mask(visible[view.begin : view.end], slots, dtype)
            made.append(Sight(view.begin, view.end, table[view.row, : view.pages], mask))
        return made
    rows, width = table.shape
    number = torch.full((rows, pages), -1, dtype=torch.int64, device=table.device)  # of each page in each row
    number.scatter_(1, table.long(), torch.arange(width, device=table.device).expand(rows, width))
    number[1:, 0] = -1  # what fills up a row's list; the padding alone has the scratch page
    number[0] = -1
    number[0, 0] = 0
    numbers = number[inputs["row"].long()][:, :, None]  # (N, P, 1)
    slots = torch.where(numbers < 0, -1, numbers * PAGE + torch.arange(PAGE, device=table.device))
    return [Sight(0, len(visible), None, _mask(visible, slots.flatten(1), dtype))]


def _mask(visible: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (n, slots) compute; slots (slots,) or (n, slots), -1 where there is none; visible (n, 3) i32."""
    import torch

    prefix_end, begin, end = visible[:, :, None].unbind(1)  # (n, 1) i32
    seen = (slots >= 0) & ((slots < prefix_end) | ((slots >= begin) & (slots < end)))
    return torch.where(seen, 0.0, -torch.inf).to(dtype)  # no query sees nothing, so no row is all -inf


def attend(q: Tensor, keys: Stored, values: Stored, seen: Sequence[Sight]) -> Tensor:
    """Attention of q (N, H, D) over what is stored, (N, H D).

    The query heads that share a key/value head are packed with the queries. In 16 bits a token alone is attended twice,
    since torch sums a single query's products in another order: so it has the same bits as in a pass of many.
    """
    import torch
    from torch.nn import functional

    _, heads, width = q.shape
    groups = keys.pages.shape[1]
    parts = []
    for begin, end, pages, mask in seen:
        k, v = (stored.get(pages, q.dtype) for stored in (keys, values))
        k, v = (p.transpose(0, 1).reshape(1, groups, -1, width) for p in (k, v))  # (1, G, slots, D)
        queries = q[begin:end]
        if end - begin == 1 and q.dtype != torch.float32:
            queries, mask = queries.repeat(2, 1, 1), mask.repeat(2, 1)
        packed = queries.transpose(0, 1).reshape(1, groups, -1, width)  # (1, G, H / G * n, D)
        y = functional.scaled_dot_product_attention(packed, k, v, mask.repeat(heads // groups, 1), scale=width**-0.5)
        parts.append(y.reshape(heads, len(queries), width).transpose(0, 1)[: end - begin].flatten(1))
    return torch.cat(parts)


class Best(NamedTuple):
    """The best token of each prediction, the mask left out."""

    token: Tensor  # (R,) i64, the first of equals
    logit: Tensor  # (R,) f32
    total: Tensor  # (R,) f32, the sum of exp(logit - best logit), one over which is the confidence


def best(logits: Tensor, mask_id: int) -> Best:
    """The best of logits (R, V) f32; `mask_id` may lie outside of them."""
    candidates = logits
    if 0 <= mask_id < logits.shape[1]:
        candidates = logits.clone()
        candidates[:, mask_id] = -1e30
    highest, token = candidates.max(-1)
    return Best(token, highest, (candidates - highest[:, None]).exp_().sum(-1))


def commit(found: Best, ids: Tensor, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], mask_id: int) -> None:
    """The commit rule, which writes the outputs; ids (R,) i32."""
    import torch

    confidence = found.total.reciprocal()
    is_open = ids == mask_id
    rank = torch.where(is_open, confidence, -1.0)
    first = inputs["span"][:, 0].long()  # (R,): the first prediction of the same row
    here = torch.arange(len(ids), device=ids.device)
    highest = torch.full_like(rank, -1.0).scatter_reduce(0, first, rank, "amax")[first]
    at_top = torch.where(rank == highest, here, len(ids))
    leftmost = torch.full_like(here, len(ids)).scatter_reduce(0, first, at_top, "amin")[first]
    chosen = (rank >= inputs["threshold"]) | (here == leftmost)
    outputs["token"].copy_(found.token)
    outputs["confidence"].copy_(confidence)
    outputs["next_ids"].copy_(torch.where(chosen & is_open, found.token, ids))


def arrange(inputs: Mapping[str, Tensor], known: Tensor, results: Tensor, table: Tensor, mask: int) -> None:
    """`plugins/ops/arrange.py`, by the host, which waits for what the device has."""
    import torch

    written = {name: inputs[name] for name in arrangement.WRITTEN if name in inputs}
    given = {**written, "known": known, "results": results, "page_table": table}
    arrays = {"adapter": np.zeros(len(inputs["ids"]), np.float32)}
    arrays |= {name: tensor.cpu().numpy() for name, tensor in given.items()}
    for target, array in zip(written.values(), arrangement.reference(**arrays, mask=mask), strict=False):
        target.copy_(torch.from_numpy(array))


def advance(inputs: Mapping[str, Tensor], results: Tensor, table: Tensor) -> None:
    """`plugins/ops/advance.py`."""
    import torch

    ids, pos, slot, visible = (inputs[name] for name in ("ids", "pos", "slot", "visible"))
    source, (token, drafted, count) = inputs["source"], inputs["verified"][:, :, None].unbind(1)  # (N, 1)
    lane = torch.arange(MAX_BLOCK, dtype=torch.int32, device=ids.device)
    judged = lane < count - 1
    said, held = (results[torch.where(judged, at + lane, 0)] for at in (token, drafted + 1))
    kept = (judged & (said == held)).int().cumprod(1, dtype=torch.int32).sum(1, dtype=torch.int32)
    ids.copy_(torch.where(source < 0, ids, results[torch.where(source < 0, 0, source + kept)]))
    moves = count[:, 0] > 0
    shift = torch.where(moves, kept + 1, 0)
    pos += shift
    visible += shift[:, None]
    page = table[inputs["row"].long(), torch.where(moves, pos // PAGE, 0).long()]
    slot.copy_(torch.where(moves, page * PAGE + pos % PAGE, slot))
