"""Measure each kernel against the bytes it must move, at a shape's sizes.

Inputs and their bytes are made from the arguments that an op declares (`plugins/op.py`), so a kernel that is added to
`OPS` or `FUSED` is measured without a line here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gpu import models as gpu_models
from gpu import products as gpu_products
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.config import ModelConfig
from nemodiff.contract import ITEMSIZE
from nemodiff.plugins import FUSED, KV_BITS, OPS
from nemodiff.plugins.op import Arg, Op, ceil_div, run, stage_op
from nemodiff.plugins.ops import confidence_commit, linear, paged_attention


def reads_context(op: Op) -> bool:
    """Whether an op is attention, in any type of K and V."""
    return op.name == "BlockAttention" or op.name.startswith("PagedAttention")


def sizes(op: Op, model: ModelConfig, tokens: int, context: int) -> dict[str, int]:
    """Each letter's size for a pass of one row.

    Caches are as long as the context, and what is rotated or embedded has as many places as tokens, so every byte
    counted must be moved.
    """
    writes = op.name.startswith("PagedRopeWrite")
    pages = ceil_div(tokens if writes else context, paged_attention.PAGE)
    letters = {"N": tokens, "A": pages, "M": pages, "B": 1, "H": model.num_heads, "G": model.num_kv_heads}
    return {
        **letters,
        "L": 3 * tokens,  # results of a forward as large
        "S": tokens,
        "R": tokens,
        "T": context,
        "D": model.head_dim,
        "P": model.head_dim // 2,
        "V": tokens if op.name == "EmbeddingNorm" else model.vocab_size,
        "E": model.hidden_size,
        "K": model.hidden_size,
        "W": widths(op, model, paged_attention.items(letters, ceil_div)),
        "F": (model.num_heads + 2 * model.num_kv_heads) * model.head_dim,
        **({"F": 2 * model.intermediate_size} if op.name.startswith("SwiGLU") else {}),
        **(product(op, model) if "Linear" in op.name else {}),
    }


def widths(op: Op, model: ModelConfig, items: int) -> int:
    """What W is in an op: a projection's shares, or the plan's items."""
    if op.name.endswith("OfShares"):
        return linear.MOST_SHARES
    return items if op.name.startswith("PagedAttention") else 0


def product(op: Op, model: ModelConfig) -> dict[str, int]:
    """The sizes of a product, which is that of gate and up where SwiGLU ends it, and else of down."""
    outputs, inputs = gpu_products.projections(model)["gate_up" if "Gated" in op.name else "down"]
    pairs = ceil_div(inputs, 2 * linear.GROUP)
    scales = 2 * pairs * outputs if op.name.startswith("Int4") else outputs
    return {"F": outputs, "K": inputs, "P": pairs, "S": scales if op.name.startswith(("Int", "Fp8")) else 0, "Z": 0}


def tensor(arg: Arg, shape: tuple[int, ...], lab: Lab, dtype: str, model: ModelConfig) -> Any:
    """An input: random numbers, or what makes a kernel do all of its work."""
    torch, device = lab.card.torch, lab.card.name
    kind = {"compute": dtype, "logits": "f32"}.get(arg.dtype, arg.dtype)
    if kind == "i32":
        made = torch.zeros(shape, dtype=torch.int32, device=device)
        return made.fill_(model.mask_id) if arg.name == "ids" else made
    if kind == "i8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    if kind == "u8":  # the bits of an e4m3 below infinity
        return torch.randint(0, 120, shape, dtype=torch.uint8, device=device)
    made = torch.empty(shape, dtype=gpu_products.types(torch)[kind], device=device)
    return made.fill_(1) if arg.name == "temperature" else made.normal_()


def of_card(op: Op, programs: int) -> Op:
    """An op as an engine has it on a card that takes so many programs at once."""
    if not op.name.startswith("PagedAttention"):
        return op
    return paged_attention.op(next(bits for bits in KV_BITS if paged_attention.op(bits).name == op.name), programs)


def measured(
    lab: Lab, op: Op, model: ModelConfig, dtype: str, letters: Mapping[str, int], programs: int | None = None
) -> Figures:
    """Seconds of one launch of an op, and its bytes as a share of the copy ceiling.

    Attention is shared out for so many programs, by default for those that an engine on this card takes.
    """
    programs = programs or lab.card.programs
    torch, used = lab.card.torch, {name for stage in op.stages for name in stage.inputs} | {"page_table"}
    inputs = [arg for arg in op.inputs if arg.name in used]

    def new(arg: Arg, shape: tuple[int, ...]) -> Any:
        kind = dtype if arg.dtype == "compute" else arg.dtype
        return torch.empty(shape, dtype=gpu_products.types(torch)[kind], device=lab.card.name)

    def made() -> dict[str, Any]:
        arrays = {arg.name: tensor(arg, arg.sizes(letters, ceil_div), lab, dtype, model) for arg in inputs}
        if "visible" in arrays:
            arrays["visible"][..., 0] = letters["T"]
        if "slot" in arrays:
            arrays["slot"].copy_(torch.arange(letters["N"]))
        if "index" in arrays:
            arrays["index"].copy_(torch.arange(letters["R"]))
        if "table" in arrays:
            arrays["ids"].copy_(torch.arange(letters["N"]))
        if "page_table" in arrays:
            arrays["page_table"].copy_(torch.arange(letters["M"]))
        if "items" in arrays:
            of_tokens = torch.zeros(letters["N"], dtype=torch.int32, device=lab.card.name)
            plan = {name: arrays[name] for name in ("visible", "page_table")} | {"row": of_tokens, "first": of_tokens}
            arrays["items"], arrays["merges"] = run(paged_attention.plan(programs), model, plan, new)
        return arrays

    with lab.card.use(gpu_models.CARRIED):
        tensors = [*made().values(), *(new(arg, arg.sizes(letters, ceil_div)) for arg in op.outputs)]
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        cases = [made() for _ in range(lab.card.sets(nbytes))]
    seconds = lab.card.per_launch([lambda case=case: run(op, model, case, new) for case in cases])
    return {
        "op": op.name,
        "stages": [stage.name for stage in op.stages],
        "us": seconds * 1e6,
        "bytes": nbytes,
        "to_copy_ceiling": lab.to_copy_ceiling(nbytes, seconds),
    }


# Of a step in the engine's dtype, and the commit rule's scans, also of an engine of the graph.
MAIN = ("PagedAttention", "PagedRopeWrite", "ResidualNorm", "SwiGLU", "FlatHeadScan16", "FlatHeadScan64")
MAIN += ("FlatSampledScan", "ConfidenceCommitScan", "SampledCommitScan", "ConfidenceCommit", "SampledCommit")


def _every() -> dict[str, Op]:
    """What is measured, by its name in the report: attention as a whole, of other ops the first stage, which scans."""
    found = {}
    for op in (*OPS, confidence_commit.SAMPLED, *FUSED):
        whole = reads_context(op) or len(op.stages) == 1
        found[op.name if reads_context(op) else op.stages[0].name] = op if whole else stage_op(op, op.stages[0])
    return found | {op.name: op for op in (confidence_commit.OP, confidence_commit.SAMPLED)}  # with the rule


EVERY = _every()


def main_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """What a step in the engine's dtype consists of, and what has a goal."""
    yield from op_cells(config, shape, MAIN)
    yield from gpu_products.linear_cells(config, shape, ("linear",))


def other_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """The other ops of the torch engine and those of the graph; products in 8 bits."""
    yield from op_cells(config, shape, [name for name in EVERY if name not in MAIN])
    yield from gpu_products.linear_cells(config, shape, ("e4m3 linear",))


def op_cells(config: RunConfig, shape: str, names: Iterable[str]) -> Iterator[Cell]:
    """Some ops at the sizes of a decode pass and of blocks."""
    model, scale = gpu_models.work(shape, config.dtype).model, config.scale
    for name, op in ((name, EVERY[name]) for name in names):
        contexts = scale.kernel_contexts if reads_context(op) else scale.kernel_contexts[:1]
        for context, tokens in itertools.product(contexts, scale.kernel_sizes):
            letters = sizes(op, model, tokens, context)

            def measure(lab: Lab, op: Op = op, letters: dict[str, int] = letters, tokens: int = tokens) -> Figures:
                figures = measured(lab, of_card(op, lab.card.programs), model, config.dtype, letters)
                return {**figures, "tokens": tokens, "context": letters["T"] if reads_context(op) else None}

            where = f" context {context}" if reads_context(op) else ""
            known = [arg.sizes(letters, ceil_div) for arg in op.inputs]
            nbytes = sum(map(math.prod, known)) * ITEMSIZE[config.dtype]
            yield Cell("kernels", shape, f"{name}{where} tokens {tokens}", 2 * nbytes + 2**29, 0.5, measure)
