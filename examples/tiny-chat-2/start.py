"""The weights that training begins from: two layers of attention that can copy before anything is learned.

A network of this size takes hours on a CPU until one layer finds out how to look at the token before, and the next how
to use that. Both are written in here instead. Layer 0 has heads that look one and two tokens back, by the phase of the
rotary embedding; they write what they see into subspaces of their own. In layer 1 half of the heads look for a place
whose previous token is the own token, and write what stands there into the head (induction); half look for the own
token, and write what stands before it. Forms of a word (after a space, without, in capitals) begin with half of their
embedding in common, so that what is copied for one is nearly right for the others. All else begins as usual. The idea
is that of mimetic initialisation (arXiv:2305.09828).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from model import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, TinyChat, frequencies
from tokenizers import Tokenizer
from torch import Tensor

STD = 0.2  # of the embeddings
CONSTANT = 8 * STD  # dimension 0 of every embedding: what heads that look at positions alone have to hold on to
SHARP = 48.0  # nats between the right offset and its neighbour
MATCH = 80.0  # nats between the own token and another one
FAST = 12  # pairs of the rotary embedding that turn fast enough to tell positions apart; the others compare tokens
SHARE = 0.3  # of the weaker heads' output, relative to the first


@torch.no_grad()
def write_copying(model: TinyChat, tokenizer: Tokenizer) -> None:
    """Write the copying heads into a freshly drawn `model`; always the same."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = model.encoder.embed_tokens.weight
    embedding.copy_(normal(*embedding.shape) * STD)
    for forms in _forms(tokenizer):
        embedding[forms] = (embedding[forms] + embedding[forms].mean(0)) / 2
    embedding[:, 0] = CONSTANT
    size = math.sqrt(STD**2 * (HIDDEN - 1) + CONSTANT**2)
    unit = math.sqrt(HIDDEN) / size  # what the norm multiplies by
    directions = torch.zeros(HIDDEN - 1, HIDDEN)  # orthonormal, without the constant
    directions[:, 1:] = torch.linalg.qr(normal(HIDDEN - 1, HIDDEN - 1))[0]
    own, before, second, said = directions[: 4 * HEAD_DIM - 1].split(HEAD_DIM)  # (D, HIDDEN); the last has D - 1
    said = torch.cat([said, normal(1, HIDDEN) * 0.01])
    gain = 1 / unit  # a value comes out as large as it is in the embedding

    looking_back, copying = (model.encoder.layers[n].self_attn for n in range(2))
    phase = _phase(SHARP / (unit * CONSTANT) ** 2)
    keys, queries = looking_back.k_proj.weight, looking_back.q_proj.weight.view(HEADS, HEAD_DIM, HIDDEN)
    keys[:HEAD_DIM], queries[:2] = 0, 0
    keys[:HEAD_DIM, 0] = phase
    for head in range(2):
        queries[head, :, 0] = math.sqrt(HEAD_DIM) * _turned(phase, head + 1)
    looking_back.v_proj.weight[:HEAD_DIM] = own
    outputs = looking_back.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM)
    outputs[:, 0], outputs[:, 1] = gain * before.T, gain * second.T

    grown = math.sqrt(HIDDEN) / math.sqrt(size**2 + 2 * HEAD_DIM * STD**2)
    slow = torch.arange(HEAD_DIM) % (HEAD_DIM // 2) >= FAST
    match = math.sqrt(MATCH / (int(slow.sum()) * (STD * grown) ** 2))
    copying.q_proj.weight.copy_(math.sqrt(HEAD_DIM) * match * (own * slow[:, None]).repeat(HEADS, 1))
    copying.k_proj.weight.copy_(match * torch.cat([before, own]) * slow.repeat(KV_HEADS)[:, None])
    copying.v_proj.weight.copy_(torch.cat([own, before]))
    strength = torch.tensor([1, SHARE, SHARE, SHARE]).repeat_interleave(HEAD_DIM)
    copying.o_proj.weight.copy_(gain * said.T.repeat(1, HEADS) * strength)
    head = model.diffusion_head.weight
    head.copy_(normal(*head.shape) * 0.005 + 0.05 / STD * embedding @ own.T @ said)


def _forms(tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each word or letter that has several."""
    forms = defaultdict(list)
    for word, token in tokenizer.get_vocab(with_added_tokens=False).items():
        if (bare := word.lstrip("Ġ").lower()).isalpha() and bare.isascii():
            forms[bare].append(token)
    return [sorted(ids) for ids in forms.values() if len(ids) > 1]


def _phase(margin: float) -> Tensor:
    """A vector (D,) whose product with itself, turned by a position, is smaller by `margin` than its square."""
    pairs = HEAD_DIM // 2
    fast = (torch.arange(pairs) < FAST).float()
    apart = float((fast * (1 - frequencies().cos())).sum())
    return torch.cat([fast * math.sqrt(margin / apart), torch.zeros(pairs)])


def _turned(vector: Tensor, offset: int) -> Tensor:
    """`vector` turned back by `offset` positions: as a query it scores most with the key `offset` tokens before."""
    x, y = vector.chunk(2)
    angle = -offset * frequencies()
    return torch.cat([x * angle.cos() - y * angle.sin(), y * angle.cos() + x * angle.sin()])
