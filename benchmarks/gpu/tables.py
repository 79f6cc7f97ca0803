"""The tables of the report of `gpu.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpu.plan import Figures

SHOWN = 12  # kernels of a pass


def tables(figures: Callable[..., list[Figures]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines of each section, from `Report.figures`."""
    peers = {(r["shape"], r["rows"], r["context"]): r["device_us"] for r in figures("peers")}

    def over_ours(forward: Figures) -> str:
        peer_us = peers.get((forward["shape"], forward["rows"], forward["context"]))
        return f"{peer_us / forward['device_us']:.2f}" if peer_us and forward["tokens"] == 1 else ""

    yield "Forward", ["shape", "rows", "context", "tokens", "device us", "wall us", "bound", "to its ceiling",
                      "compiled plain torch over it", "GiB at most"], [
        [r["shape"], str(r["rows"]), str(r["context"]), str(r["tokens"]), f"{r['device_us']:.0f}",
         f"{r['wall_us']:.0f}", r["bound"], f"{r['to_ceiling']:.2f}", over_ours(r),
         f"{r['peak_bytes'] / 2**30:.1f}" if r["peak_bytes"] else ""]
        for r in figures("forward")
    ]  # fmt: skip
    yield "Ways to run it, us by tokens", ["shape", "way", "context", "device us", "wall us"], [
        [r["shape"], r["variant"], str(r["context"]),
         *(", ".join(f"{size}: {v[us]:.0f}" for size, v in r.items() if isinstance(v, dict))
           for us in ("device_us", "wall_us"))]
        for r in figures("variants")
    ]  # fmt: skip
    yield "Kernels", ["shape", "op", "tokens", "context", "us", "KiB", "over the copy ceiling"], [
        [r["shape"], r["op"] if r["op"].endswith("Attention") else r["stages"][0], str(r["tokens"]),
         str(r["context"] or ""), f"{r['us']:.2f}", f"{r['bytes'] / 1024:.0f}", f"{r['to_copy_ceiling']:.2f}"]
        for r in figures("kernels")
    ]  # fmt: skip
    yield "Where the time of a pass goes", ["shape", "way", "context", "tokens", "kernel", "us", "launches"], [
        [r["shape"], r.get("way", "graphs"), str(r["context"]), str(r["tokens"]), f"`{one['name'][:70]}`",
         f"{one['us']:.1f}", f"{one['launches']:g}"]
        for r in figures("profile")
        for one in [*r["kernels"][:SHOWN], {"name": "all", "us": r["us"], "launches": r["launches"]}]
    ]  # fmt: skip
    yield "Kernels with other tiles, us", ["shape", "kernel", "context", "tokens", "us", "winner"], [
        [r["shape"], r.get("kernel", "PagedAttention"), str(r["context"]), str(r["tokens"]),
         "; ".join(f"{name}: {us:.2f}" for name, us in r["variants"].items()), r["winner"]]
        for r in figures("tiles")
    ]  # fmt: skip
    yield "Ways to multiply by a narrow matrix", ["shape", "matrix", "way", "us by tokens", "same bits", ""], [
        [r["shape"], f"{r['out']} x {r['in']}", name, ", ".join(f"{n}: {us:.2f}" for n, us in way["us"].items())
         if "us" in way else way["skipped"], {True: "yes", False: "no"}.get(way.get("same_bits"), ""),
         "wins" if name == r["winner"] else ""]
        for r in figures("narrow")
        for name, way in r["ways"].items()
    ]  # fmt: skip
    yield "First answers", ["shape", "way", "first ms", "next ms", "speed of the first", "ms to its first token",
                            "warm-up s", "graphs", "kernels", "warm-up GiB"], [
        [r["shape"], name, f"{way['first_ms']:.0f}", f"{way['later_ms']:.0f}", f"{way['speed_of_first']:.2f}",
         f"{way['ms_to_first_token']:.1f}", f"{r['warm_up_seconds']:.1f}", str(r["graphs"]), str(r["kernels"]),
         f"{r['warm_up_bytes'] / 2**30:.2f}"]
        for r in figures("first")
        for name, way in r["ways"].items()
        if "skipped" not in way
    ]  # fmt: skip
    yield (
        "Decoding at the published acceptance",
        ["shape", "way", "tokens/s", "tokens per pass", "card stands still"],
        [
            [
                r["shape"],
                r["way"],
                f"{r['tokens_per_second']:.1f}",
                f"{r['tokens_per_pass']:.2f}",
                f"{r['host_gap']:.1%}",
            ]
            for r in figures("decode")
            if "way" in r
        ],
    )
    yield "Cost curve that planning uses, us by tokens", ["shape", "us", "seconds to measure"], [
        [r["shape"], ", ".join(f"{s}: {t:.0f}" for s, t in zip(r["sizes"], r["curve_us"], strict=True)),
         f"{r['seconds_to_measure']:.2f}"]
        for r in figures("decode")
        if "sizes" in r
    ]  # fmt: skip
    yield "Answers", ["checkpoint", "type", "mode", "tokens/s", "tokens per pass", "unlike ar", "unlike the CPU"], [
        [r["shape"], r["dtype"], mode, f"{m['tokens_per_second']:.0f}", f"{m['tokens_per_pass']:.2f}",
         str(m["answers_unlike_ar"]), str(m["answers_unlike_cpu"])]
        for r in figures("modes")
        for mode, m in r["modes"].items()
    ]  # fmt: skip
    yield "Many requests", ["shape", "way", "requests", "tokens/s", "ms to first", "gap ms", "99th", "tokens a forward",
                            "card idle", "pages", "preempted", "captured meanwhile"], [
        [r["shape"], r["way"], str(r["requests"]), f"{r['tokens_per_second']:.0f}", f"{r['ms_to_first_token']:.0f}",
         f"{r['gap_ms']:.1f}", f"{r['gap_ms_p99']:.1f}", f"{r['tokens_per_forward']:.0f}",
         f"{100 * r['host_gap']:.0f} %", str(r["pages"]), str(r["preempted"]), str(r["captured_meanwhile"])]
        for r in figures("serve")
    ]  # fmt: skip
    yield "Plain torch, one token", ["shape", "peer", "rows", "context", "us", "without a graph", "first step s"], [
        [r["shape"], r["peer"], str(r["rows"]), str(r["context"]), f"{r['device_us']:.0f}",
         f"{r['wall_us_without_graph']:.0f}", f"{r['first_seconds']:.1f}"]
        for r in figures("peers")
    ]  # fmt: skip
    yield "TensorRT", ["backend", "rows", "context", "tokens", "us", "to ceiling", "eager over graph"], [
        [t["backend"], str(f["rows"]), str(f["context"]), str(f["tokens"]), f"{f['us']:.1f}",
         f"{f['ratio_to_ceiling']:.2f}", f"{f['eager_over_graph']:.2f}"]
        for t in figures("tensorrt")
        for f in t["forward"]
    ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]
