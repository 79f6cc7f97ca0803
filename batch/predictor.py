"""The engine as a step of a user's own Ray dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NemodiffError, RequestError
from ..runtime.loading import check_rows, load
from ..runtime.requests.options import OPTIONS, make_options
from .answers import answer_lines
from .lines import given, make_line, report_of

if TYPE_CHECKING:
    import numpy as np

    from .lines import Line

_READ = ("prompt", "messages", *OPTIONS)


class Predictor:
    """Answers batches of rows, for `Dataset.map_batches(Predictor, fn_constructor_args=(engine,), ...)`.

    A batch needs the column `prompt` (text) or `messages`; columns named as options set those row by row, all others
    pass through. Added are `text`, `finish_reason` and `error` (text, None where there is none), and `prompt_tokens`
    and `tokens` (counts, int64).

    Args:
        engine: an engine folder that every machine can read.
        rows: rows of a batch that are decoded at the same time; None takes the engine's max_batch_size.
        threads, device: as in `load`.
        options: fields of `Options`, for rows that do not set them.

    Raises:
        EngineError: the engine cannot be loaded.
        RequestError: an option or `rows` is out of range, or an option asks for what belongs to tokens.
    """

    def __init__(
        self,
        engine: str | Path,
        *,
        rows: int | None = None,
        threads: int | None = None,
        device: int | str | None = None,
        **options: Any,
    ) -> None:
        make_options(options)
        _check_reports(options)
        self._engine = load(engine, threads=threads, device=device)
        self._rows = self._engine.info.build.max_batch_size if rows is None else rows
        check_rows(self._engine.info, self._rows)
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with its answers. A row that is refused has an `error`; the others are answered.

        Raises RequestError where the batch itself is none.
        """
        import numpy as np

        size = _size(batch)
        outcomes: list[dict[str, Any]] = [{} for _ in range(size)]
        lines: list[Line] = []
        for number in range(size):
            try:
                line = make_line(_fields(batch, number), Path("batch"), number + 1)
                _check_reports(line.options, f"{line.path}, line {line.number}: ")
                lines.append(line)
            except RequestError as error:
                outcomes[number] = {"error": str(error)}
        choices: dict[str, Any] = {"rows": self._rows, "prefix_reuse": True, "text": False}
        for line, result in answer_lines(self._engine, lines, self._options, lambda event: event, **choices):
            if isinstance(result, NemodiffError):
                outcomes[line.number - 1] = {"error": str(line.refusal(result))}
            else:
                outcomes[line.number - 1] = {
                    "text": result.text,
                    "finish_reason": result.finish_reason,
                    "prompt_tokens": result.prompt_tokens,
                    "tokens": len(result.token_ids),
                }
        texts = {n: np.array([o.get(n) for o in outcomes], object) for n in ("text", "finish_reason", "error")}
        counts = {n: np.array([o.get(n, 0) for o in outcomes], np.int64) for n in ("prompt_tokens", "tokens")}
        return {**batch, **texts, **counts}


def _size(batch: object) -> int:
    """The rows of a batch. Raises RequestError."""
    if not isinstance(batch, Mapping):
        raise RequestError(
            f"a batch is of type {type(batch).__name__}, allowed: columns by their names, as batch_format='numpy' gives"
        )
    sizes = sorted({len(column) for column in batch.values()})
    if len(sizes) > 1:
        raise RequestError(f"the columns of a batch have {sizes[0]} and {sizes[-1]} rows, allowed: as many each")
    return sizes[0] if sizes else 0


def _check_reports(options: Mapping[str, Any], place: str = "") -> None:
    """Refuse options that ask for what no column is for. Raises RequestError."""
    if (name := report_of(options)) is not None:
        raise RequestError(f"{place}{name} belong to tokens, for which answers here have no column; leave {name} out")


def _fields(batch: Mapping[str, np.ndarray], number: int) -> dict[str, Any]:
    """A row's prompt and options as plain values, those that are given."""
    return given({name: _plain(batch[name][number]) for name in _READ if name in batch})


def _plain(value: Any) -> Any:
    """Without NumPy's types, which Ray uses for columns."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
