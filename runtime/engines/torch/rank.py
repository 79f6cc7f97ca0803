"""Opens a torch engine, alone or as one of several ranks. Run as a program it is a further rank, started by rank 0."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Literal

from ....engine_info import EngineInfo, read_engine
from ....errors import EngineError
from .device import import_torch
from .engine import TorchEngine
from .ranks import Ranks, join


def open_engine(
    folder: Path,
    info: EngineInfo,
    device: int | Literal["cpu"] | None,
    threads: int | None,
    *,
    memory: float,
    tp_size: int | None = None,
) -> TorchEngine:
    """The engine of this process. A rank beside rank 0 does not return: its process ends when rank 0 does.

    The arguments are those of `load`. Raises EngineError and RequestError.
    """
    import_torch(folder)
    ranks = join(folder, info, tp_size, device)
    if ranks is None:
        return TorchEngine(folder, info, device, threads, memory=memory)
    if ranks.rank:
        try:
            with ranks.watched():
                _mirror(folder, info, ranks)
        finally:
            ranks.leave()
        sys.exit(0)
    if not ranks.gpu and threads is None:
        threads = max(1, (os.cpu_count() or 1) // ranks.size)
    ranks.tell(threads)
    atexit.register(ranks.close)
    with ranks.watched():
        return TorchEngine(folder, info, ranks.device, threads, memory=memory, ranks=ranks)


def _mirror(folder: Path, info: EngineInfo, ranks: Ranks) -> None:
    threads = ranks.hear()
    TorchEngine(folder, info, ranks.device, threads, pages=1, ranks=ranks).mirror()


def main() -> None:
    """`python -m nemodiff.runtime.engines.torch.rank ENGINE [cpu]`, with the variables of torchrun.

    On its standard output, which rank 0 reads, is the error of its own that has ended it, and nothing else.
    It ends with its input, which rank 0 holds open; signals to all processes of a service are for rank 0 alone.
    """
    for one in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, one):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, one), signal.SIG_IGN)
    threading.Thread(target=_end_with_input, daemon=True).start()
    folder = Path(sys.argv[1])
    info = read_engine(folder)
    rank_0, sys.stdout = sys.stdout, sys.stderr
    ranks = None
    code = 0
    try:
        ranks = join(folder, info, None, "cpu" if "cpu" in sys.argv[2:] else None)
        assert ranks is not None
        _mirror(folder, info, ranks)
    except (EngineError, RuntimeError) as error:
        if isinstance(error, EngineError) and ranks is not None and ranks.lost is None:
            print(error, file=rank_0, flush=True)
        code = 1  # rank 0 tells what is wrong, unless it has ended
    os._exit(code)  # gloo's threads may still run; see Ranks.leave


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(0)


if __name__ == "__main__":
    main()
