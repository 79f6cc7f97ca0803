"""The goals of `gpu.py`: figures of one row at the 8B shape, relative to the ceilings of their own runs.

On a CPU the same rules look at the tiny shape, which tests them and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu import modes as gpu_modes
from gpu import script as gpu_script
from gpu import serve as gpu_serve
from gpu.forward import OWN_PRODUCTS
from gpu.plan import RunConfig


def goals(report: Any, config: RunConfig) -> Iterator[tuple[str, float | str, Any, float, str]]:
    """Name, figure or why it is missing, sense, limit and unit of each goal: of the 8B shape, or of what a CPU runs."""
    shape = "tiny" if report.about["name"] == "cpu" else "8b"
    short, middle = config.scale.contexts[:2]
    least, most = config.scale.kernel_contexts[0], config.scale.kernel_contexts[-1]
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

    def kernel(key: str, name: str) -> float:
        return field("kernels", key, name)

    def attention(context: int, name: str, least: int, most: int) -> list[float]:
        sizes = [size for size in config.scale.kernel_sizes if least <= size <= most]
        return [kernel(f"PagedAttention context {context} tokens {size}", name) for size in sizes]

    def variant(name: str, context: int = middle, figure: str = "device_us") -> float:
        figures = report.cells.get(f"variants/{shape}/{name} context {context}", {"skipped": "not reached yet"})
        if "skipped" in figures:
            raise LookupError(f"variants/{shape}/{name} context {context}: {figures['skipped']}")
        return float(figures["1"][figure])

    def unlike_alone() -> float:
        found = [r["ways"]["in shares"] for r in report.figures("narrow", shape)]
        if not found:
            raise LookupError(f"narrow/{shape}: not reached yet")
        return sum(not way.get("same_bits") for way in found)

    def first(name: str) -> list[float]:
        figures = report.cells.get(f"first/{shape}/answers", {"skipped": "not reached yet"})
        if "skipped" in figures:
            raise LookupError(f"first/{shape}/answers: {figures['skipped']}")
        for key, way in figures["ways"].items():
            if "skipped" in way:
                raise LookupError(f"first/{shape}/answers, {key}: {way['skipped']}")
        return [float(way[name]) for way in figures["ways"].values()]

    def chosen_otherwise() -> float:
        sizes = [one for r in report.figures("variants", shape) for one in r.values() if isinstance(one, dict)]
        found = [one["same_choice"] for one in sizes if "same_choice" in one]
        if not found:
            raise LookupError(f"variants/{shape}/pdl: not reached yet")
        return found.count(False)

    def rate(setting: str) -> float:
        return field("decode", setting, "tokens_per_second")

    def served(way: str, count: int) -> float:
        return field("serve", f"{way} requests {count}", "tokens_per_second")

    def made(section: str, *keys: str) -> float:
        return sum(field(section, key, f"{kind}_meanwhile") for key in keys for kind in ("captured", "compiled"))

    def made_serving() -> float:
        keys = [f"{way} requests {crowd}" for way in gpu_serve.WAYS]
        others = (f"{r['way']} requests {r['requests']}" for r in report.figures("serve", shape))
        return made("serve", *dict.fromkeys([*keys, *others]))

    def standing_still() -> float:
        others = (name for name, how in gpu_modes.SETTINGS.items() if how["mode"] != "ar")
        return max(100 * field("decode", name, "host_gap") for name in others)

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
        (f"AR step of {shape}, context {short}, over the time its weight bytes take to copy",
         lambda: forward(short, 1, "over_weight_bytes"), "at most", 1.12, "x"),
        (f"the same with own products and kernels that begin early, {shape}, context {short}",
         lambda: variant(OWN_PRODUCTS, short, "over_weight_bytes"), "at most", 1.12, "x"),
        (f"block of {block} over the AR step, {shape}, context {short}", lambda: over_ar(short), "at most", 1.10, "x"),
        (f"block of {block} over the AR step, {shape}, context {middle}",
         lambda: over_ar(middle), "at most", 1.15, "x"),
        (f"AR step over plain torch compiled, {shape}, context {short}",
         lambda: forward(short, 1, "device_us") / field("peers", f"rows 1 context {short}", "device_us"),
         "at most", 1.0, "x"),
        (f"PagedAttention of up to {picked} tokens, context {least}, the worst",
         lambda: max(attention(least, "us", 1, 32)), "at most", 5.0, "us"),
        (f"PagedAttention of up to 8 tokens over the copy ceiling, context {most}, the worst",
         lambda: min(attention(most, "to_copy_ceiling", 1, 8)), "at least", 0.75, "x"),
        (f"PagedAttention of {picked} tokens over the copy ceiling, context {most}",
         lambda: min(attention(most, "to_copy_ceiling", picked, picked)), "at least", 0.5, "x"),
        (f"ConfidenceCommitScan over the copy ceiling, block of {picked}",
         lambda: kernel(f"ConfidenceCommitScan tokens {picked}", "to_copy_ceiling"), "at least", 0.6, "x"),
        (f"SampledCommitScan over the copy ceiling, block of {picked}",
         lambda: kernel(f"SampledCommitScan tokens {picked}", "to_copy_ceiling"), "at least", 0.4, "x"),
        (f"FlatSampledScan over the copy ceiling, block of {picked}",
         lambda: kernel(f"FlatSampledScan tokens {picked}", "to_copy_ceiling"), "at least", 0.4, "x"),
        ("passes that choose otherwise where kernels begin early", chosen_otherwise, "at most", 0, "passes"),
        ("products in shares whose bits depend on the pass", unlike_alone, "at most", 0, "products"),
        (f"AR step in fp8 over {config.dtype}, {shape}, context {middle}",
         lambda: variant("fp8") / variant("graphs"), "at most", 0.62, "x"),
        (f"time the card stands still in ar, {shape}", lambda: 100 * field("decode", "ar", "host_gap"),
         "at most", 2.0, "%"),
        (f"time the card stands still in the other modes, {shape}, the worst", standing_still, "at most", 3.0, "%"),
        (f"speed of a first answer over the next ones, {shape}, the worst way",
         lambda: min(first("speed_of_first")), "at least", 0.9, "x"),
        (f"first token of a first answer, {shape}, the worst way",
         lambda: max(first("ms_to_first_token")), "at most", 500.0, "ms"),
        ("graphs and kernels made by first answers", lambda: made("first", "answers"), "at most", 0, "made"),
        (f"linear_spec over ar at the published {published} tokens per pass, {shape}",
         lambda: rate("linear_spec") / rate("ar"), "at least", 5.0, "x"),
        (f"linear_spec in fp8 at the published {published} tokens per pass, {shape}, on an H200",
         lambda: rate(gpu_modes.FP8), "at least", 1500.0, "tokens/s"),
        (f"budgeted quadratic_spec over linear_spec at the same acceptance, {shape}",
         lambda: rate("quadratic_spec, budget") / rate("linear_spec"), "at least", 1.15, "x"),
        (f"{crowd} requests over one in ar, {shape}",
         lambda: served("ar", crowd) / served("ar", 1), "at least", 8.0, "x"),
        (f"{crowd} requests over one in linear_spec, {shape}",
         lambda: served("linear_spec", crowd) / served("linear_spec", 1), "at least", 4.0, "x"),
        ("graphs and kernels made while requests are served", made_serving, "at most", 0, "made"),
        ("answers of causal modes unlike ar, f32", lambda: unlike("answers_unlike_ar"), "at most", 0, "answers"),
        ("answers unlike the CPU's, f32", lambda: unlike("answers_unlike_cpu"), "at most", 0, "answers"),
    ]  # fmt: skip
    for name, figure, sense, limit, unit in rules:
        try:
            yield name, figure(), sense, limit, unit
        except LookupError as error:
            yield name, str(error.args[0]), sense, limit, unit
        except (ArithmeticError, TypeError, ValueError) as error:
            yield name, f"its figures make no sense: {error}", sense, limit, unit
