"""A job of Ray Data: workers on as many machines as there are answer the shards of an input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engine_folder import engine_digest
from ..engine_info import EngineInfo, read_engine
from ..errors import EngineError, NemodiffError, RequestError
from ..runtime.loading import check_device, check_rows, check_threads
from ..runtime.requests.options import make_options
from ..runtime.requests.settings import settle
from ..runtime.text.codec import TextCodec
from .cluster import connected, reason
from .output import check_leftovers, claimed, write_failed
from .parts import JOURNALS
from .shards import Shard, cut, find_inputs
from .worker import Work, Worker

_MOST_BLOCKS = 20_000  # each costs its driver about 8 ms (docs/batch.md)


@dataclasses.dataclass
class Totals:
    """Of a job: rows answered now, kept from before and failed; tokens of the answers of now; workers."""

    rows: int = 0
    answered: int = 0
    kept: int = 0
    failed: int = 0
    tokens: int = 0
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for.

    engine: a folder that every machine can read under this path. inputs: files and patterns of JSON lines or Parquet.
    output: a folder on storage that all machines share. flags: options of all rows. workers: None takes one per GPU,
    or per machine. rows, threads, device: of each worker. address: of a Ray cluster; None is RAY_ADDRESS or this
    machine. rows_per_part: the size of a shard.
    """

    engine: Path
    inputs: tuple[str, ...]
    output: Path
    flags: Mapping[str, Any]
    rows_per_part: int
    workers: int | None = None
    rows: int | None = None
    threads: int | None = None
    device: str | None = None
    address: str | None = None
    format: str | None = None  # jsonl or parquet; None is that of the first input


def run_job(job: Job, progress: Callable[[int, int], None]) -> Totals:
    """Answer all rows that have no answer yet; `progress` is told rows done and rows in all.

    Raises:
        RequestError: inputs, options or the output's folder do not fit, or fit no engine.
        EngineError: the engine, or a worker, failed; the same job can be run again.
    """
    info = read_engine(job.engine)
    if job.rows is not None:
        check_rows(info, job.rows)
    settle(info, TextCodec(job.engine), 0, make_options(dict(job.flags)))
    inputs = find_inputs(job.inputs, job.output)
    shards = cut(inputs, job.rows_per_part)
    if not shards:
        raise RequestError(f"{', '.join(job.inputs)}: no prompts; give files of JSON lines or Parquet")
    suffix = f".{job.format}" if job.format else ".parquet" if inputs[0].suffix == ".parquet" else ".jsonl"
    work = Work(job.engine.resolve(), job.output.resolve(), suffix, job.flags, job.rows, job.threads, job.device)
    totals = Totals()
    failed: list[tuple[str, list[dict[str, Any]]]] = []
    said = {
        "engine": engine_digest(job.engine),
        "inputs": [str(path) for path in inputs],
        "rows_per_part": job.rows_per_part,
        "format": suffix[1:],
        **job.flags,
    }
    with claimed(job.output, json.loads(json.dumps(said))), connected(job.address) as ray:
        check_leftovers(job.output, shards, suffix)
        rows = sum(shard.count for shard in shards)
        progress(0, rows)
        done = 0
        for result in _results(ray, job, info, work, shards, totals):
            totals.rows += result["rows"]
            totals.answered += result["answered"]
            totals.kept += result["kept"]
            totals.tokens += result["tokens"]
            totals.failed += len(result["failed"])
            failed.append((result["part"], result["failed"]))
            done += result["count"]
            progress(done, rows)
        write_failed(job.output, [failure for _, failures in sorted(failed) for failure in failures])
        shutil.rmtree(job.output / JOURNALS, ignore_errors=True)  # what is left in it are rows that have left the input
    return totals


def _results(
    ray: Any, job: Job, info: EngineInfo, work: Work, shards: list[Shard], totals: Totals
) -> Iterator[dict[str, Any]]:
    """What became of each shard, as they end."""
    from ray.data import ActorPoolStrategy, from_items

    backend = info.manifest.backend
    gpus = int(ray.cluster_resources().get("GPU", 0))
    on_gpu = check_device(job.device, backend) != "cpu" and backend != "onnxruntime" and (gpus > 0 or job.device)
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    machines = [count for count in cpus if count > 0]
    if job.threads and machines and not on_gpu:  # Ray would wait without end for a machine that has so many
        check_threads(job.threads, max(machines), "the largest machine")
    workers = job.workers or (gpus if on_gpu else len(machines)) or 1
    if not machines and not on_gpu:
        raise RequestError("the cluster has no CPUs for workers; start a machine of it with some")
    workers = min(workers, len(shards))
    threads = job.threads or max(1, min(machines, default=1) * len(machines) // max(workers, len(machines)))
    totals.workers = workers
    share: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": threads}
    if not on_gpu:
        work = dataclasses.replace(work, threads=threads)
    # A worker has one shard and the next; where a machine is lost, what it had is answered by another.
    pool = ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2)
    items = [dataclasses.asdict(shard) for shard in shards]
    rows = from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
    step: Any = Worker  # Ray's types know functions alone here
    try:
        for row in rows.map(step, fn_constructor_args=(work,), compute=pool, **share).iter_rows():
            yield json.loads(row["done"])
    except NemodiffError:
        raise
    except Exception as error:  # whatever Ray makes of what went wrong in a worker
        raise EngineError(f"a worker failed ({reason(error)}); run the same command again to go on") from None
