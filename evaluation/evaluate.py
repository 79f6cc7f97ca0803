"""Runs lm-eval's tasks over an engine, once per mode."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not sys.stderr.isatty():  # bars of lm-eval and the libraries below it; tqdm looks at this when it is imported
    os.environ.setdefault("TQDM_DISABLE", "1")
import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from ..errors import NemodiffError, RequestError, first_line
from ..runtime.loading import LoadedEngine, check_rows
from ..runtime.requests.generation import tokens_per_pass
from ..version import __version__
from .lm import EngineLM, Work

OF_DIFFUSION = ("policy", "per_step", "entropy_bound", "block_steps", "merge_commit")
_SEED = 1234  # of the examples before a question, as lm-eval's command has it
_RESAMPLES = 100  # for the error of metrics that have no formula for it


def evaluate(
    engine: LoadedEngine,
    tasks: Sequence[str],
    modes: Sequence[str],
    *,
    rows: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate an engine.

    Args:
        engine: from `load`.
        tasks: names of lm-eval's tasks, and paths of task files (YAML) or of folders of them.
        modes: to generate in; what tasks score is the same in each.
        rows: requests at a time.
        limit: questions of each task; None is all.
        num_fewshot: examples before each question; None is the task's own number.
        chat: put every question through the engine's chat template.
        options: of generation, beside what a task says; those of diffusion alone are left out in other modes.

    Returns:
        An object for JSON: per mode and task the metrics, the samples, and for generated answers tokens, passes by
        kind, tokens per pass and seconds.

    Raises:
        RequestError: there is no such task, its data cannot be had, or an option or `rows` is out of range.
    """
    check_rows(engine.info, rows)
    options = dict(options or {})
    lm = EngineLM(engine, rows=rows, chat=chat, thinking=bool(options.get("thinking")))
    loaded = _load(tasks, num_fewshot)
    results = {}
    for mode in dict.fromkeys(modes):
        shared = {name: value for name, value in options.items() if mode == "diffusion" or name not in OF_DIFFUSION}
        lm.options = {**shared, "mode": mode}
        lm.work = {}
        began = time.perf_counter()
        with _refusing():
            found = lm_eval.evaluator.evaluate(
                lm, loaded, limit=limit, apply_chat_template=chat, log_samples=False, bootstrap_iters=_RESAMPLES
            )
        seconds = time.perf_counter() - began
        assert found is not None
        counts = found["n-samples"]
        results[mode] = {
            "seconds": seconds,
            "tasks": {
                name: {
                    "metrics": _metrics(values),
                    "samples": counts[name]["effective"] if name in counts else None,
                    **_work(lm.work.get(name)),
                }
                for name, values in found["results"].items()
            },
        }
    return {
        "engine": engine.folder.name,
        "backend": engine.info.manifest.backend,
        "chat": chat,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "options": options,
        "versions": {"nemodiff": __version__, "lm_eval": importlib.metadata.version("lm_eval")},
        "modes": results,
    }


def _load(tasks: Sequence[str], num_fewshot: int | None) -> Any:
    """The tasks, with their data, as lm-eval's evaluator takes them. Raises RequestError."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not tasks:
        raise RequestError("--tasks names no task; give names, task files (YAML) or folders of them")
    for task in tasks:
        if task.endswith((".yaml", ".yml", "/")) and not Path(task).exists():
            raise RequestError(f"--tasks: {task}: no such file; give a task file (YAML) or a folder of them")
    paths = {task: Path(task).resolve() for task in tasks if Path(task).exists()}  # lm-eval reads them from elsewhere
    folders = [path for path in paths.values() if path.is_dir()]
    names = [task for task in tasks if task not in paths]
    # Listing lm-eval's own thousands of tasks takes seconds.
    manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
    loaded: list[Any] = []
    for task in tasks:
        path = paths.get(task)
        specs, folder = [task], Path()
        if path and path.is_dir():
            inside = TaskManager(include_path=path, include_defaults=False)
            specs, folder = inside.all_subtasks, path
            if not specs:
                raise RequestError(f"--tasks: {task}: no task files in it; give a folder that holds some (YAML)")
        elif path:
            specs, folder = [str(path)], path.parent
        elif task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 1)
            remedy = f"is {near[0]} meant?" if near else "list them: lm-eval ls tasks, or give the path of a YAML file"
            raise RequestError(f"--tasks: {task!r:.60} is no task of lm-eval and no file; {remedy}")
        for spec in specs:
            with _refusing(f"--tasks: {spec}: "), contextlib.chdir(folder):  # where a task's data files are looked for
                found = manager.load([spec])
            loaded += found["groups"].values() or found["tasks"].values()
    with _refusing("--tasks: "):
        chosen = manager.load(loaded)
    for task in chosen["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # a task that has none may not be given any
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)
    return chosen


@contextlib.contextmanager
def _refusing(where: str = "lm-eval: ") -> Any:
    """Makes one line of whatever lm-eval and the libraries below it raise."""
    try:
        yield
    except NemodiffError:
        raise
    except Exception as error:
        raise RequestError(
            f"{where}{type(error).__name__} ({first_line(error):.300}); see the task's file and data"
        ) from error


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and so on, by their names without the filter where it is none."""
    numbers = {name: value for name, value in values.items() if isinstance(value, float | int) and "," in name}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _work(work: Work | None) -> dict[str, Any]:
    if work is None:
        return {}
    decode, every = tokens_per_pass(work.tokens, work.nfe)
    return {
        "tokens": work.tokens,
        "nfe": work.nfe,
        "tokens_per_pass": decode,
        "tokens_per_pass_with_prefill": every,
        "seconds": work.seconds,
    }
