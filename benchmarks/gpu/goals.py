"""The goals of `gpu.py`: figures of one row at the 8B shape, relative to the ceilings of their own runs.

On a CPU the same rules look at the tiny shape, which tests them and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu import script as gpu_script
from gpu import serve as gpu_serve
from gpu.plan import RunConfig


def goals(report: Any, config: RunConfig) -> Iterator[tuple[str, float | str, Any, float, str]]:
    """Name, figure or why it is missing, sense, limit and unit of each goal: of the 8B shape, or of what a CPU runs."""
    shape = "tiny" if report.about["name"] == "cpu" else "8b"
    short, middle = config.scale.contexts[:2]
    block, picked = (
        max(size for size in sizes if size <= 32) for sizes in (config.scale.sizes, config.scale.kernel_sizes)
    )

    crowd = max(count for count in config.scale.requests if count <= 16)

    def field(section: str, key: str, name: str, where: str = shape) -> float:
        figures = report.cells.get(f"{section}/{where}/{key}", {"skipped": "not reached yet"})
        if "skipped" in figures:
            raise LookupError(f"{section}/{where}/{key}: {figures['skipped']}")
        return float(figures[name])

    def forward(context: int, size: int, name: str) -> float:
        return field("forward", f"rows 1 context {context} tokens {size}", name)

    def attention() -> float:
        shares = [r["to_copy_ceiling"] for r in report.figures("kernels", shape) if r["op"] == "BlockAttention"]
        count = len(config.scale.kernel_sizes) * len(config.scale.kernel_contexts)
        if len(shares) < count:
            raise LookupError(f"kernels/{shape}: {len(shares)} of {count} figures of BlockAttention")
        return min(shares)

    def rate(setting: str) -> float:
        return field("decode", setting, "tokens_per_second")

    def served(way: str, count: int) -> float:
        return field("serve", f"{way} requests {count}", "tokens_per_second")

    def captured() -> float:
        return sum(field("serve", f"{way} requests {crowd}", "captured_meanwhile") for way in gpu_serve.WAYS)

    def unlike(other: str) -> float:
        figures = report.cells.get(f"modes/{config.checkpoint.name}/f32", {"skipped": "not reached yet"})
        if "skipped" in figures:
            raise LookupError(f"modes/{config.checkpoint.name}/f32: {figures['skipped']}")
        return float(
            sum(m[other] for mode, m in figures["modes"].items() if mode != "diffusion" or other != "answers_unlike_ar")
        )

    def over_ar(context: int) -> float:
        return forward(context, block, "device_us") / forward(context, 1, "device_us")

    published = gpu_script.PUBLISHED
    rules: list[tuple[str, Any, str, float, str]] = [
        (
            f"AR step of {shape}, context {short}, over the time its weight bytes take to copy",
            lambda: forward(short, 1, "over_weight_bytes"), "at most", 1.10, "x",
        ),
        (
            f"block of {block} over the AR step, {shape}, the worse of contexts {short} and {middle}",
            lambda: max(over_ar(short), over_ar(middle)), "at most", 1.15, "x",
        ),
        ("BlockAttention over the copy ceiling, the worst of all sizes and contexts", attention, "at least", 0.80, "x"),
        (f"ConfidenceCommit over the copy ceiling, block of {picked}",
         lambda: field("kernels", f"ConfidenceCommitScan tokens {picked}", "to_copy_ceiling"), "at least", 0.85, "x"),
        (f"time the card stands still in ar, {shape}", lambda: 100 * field("decode", "ar", "host_gap"),
         "at most", 2.0, "%"),
        (f"linear_spec over ar at the published {published} tokens per pass, {shape}",
         lambda: rate("linear_spec") / rate("ar"), "at least", 5.0, "x"),
        (f"budgeted quadratic_spec over linear_spec at the same acceptance, {shape}",
         lambda: rate("quadratic_spec, budget") / rate("linear_spec"), "at least", 1.15, "x"),
        (f"{crowd} requests over one in ar, {shape}",
         lambda: served("ar", crowd) / served("ar", 1), "at least", 8.0, "x"),
        (f"{crowd} requests over one in linear_spec, {shape}",
         lambda: served("linear_spec", crowd) / served("linear_spec", 1), "at least", 4.0, "x"),
        ("graphs captured while requests are served", captured, "at most", 0, "graphs"),
        ("answers of causal modes unlike ar, f32", lambda: unlike("answers_unlike_ar"), "at most", 0, "answers"),
        ("answers unlike the CPU's, f32", lambda: unlike("answers_unlike_cpu"), "at most", 0, "answers"),
    ]  # fmt: skip
    for name, figure, sense, limit, unit in rules:
        try:
            yield name, figure(), sense, limit, unit
        except LookupError as error:
            yield name, str(error.args[0]), sense, limit, unit
