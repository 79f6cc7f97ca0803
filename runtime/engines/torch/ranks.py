"""The processes that hold one model together, and what they say to each other.

Rank 0 serves requests. The others do what it says: their weights, heads and K/V are shares of the same layers, so a
forward is the same for all ranks, and its sums run through torch.distributed: NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ....config import ModelConfig
from ....contract import QUANTIZED_INPUTS, Quantization
from ....engine_info import EngineInfo
from ....errors import EngineError, RequestError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = datetime.timedelta(minutes=30)  # that a rank waits for the others of a sum, or to be reached by them
_SILENCE = datetime.timedelta(days=20)  # that it waits for a word; a rank that ends is noticed at once
_END = 5.0  # seconds that ranks have to end
_GLANCE = 0.1  # seconds between two looks at whether all live


class _ApartError(RuntimeError):
    """What all ranks do together has failed here, as it does where another one has ended."""


class Ranks:
    """This process's place among the ranks.

    Args:
        folder: of the engine, for messages.
        size: ranks.
        gpu: whether they compute on GPUs.
        command: what starts another rank, for rank 0; None where torchrun has started all.

    Raises:
        EngineError: the ranks cannot reach each other.
    """

    def __init__(self, folder: Path, size: int, gpu: bool, command: list[str] | None) -> None:
        from torch import distributed

        self.size = size
        self.gpu = gpu
        self.lost: str | None = None  # what has ended them
        self._folder = folder
        self._distributed = distributed
        self._started: list[subprocess.Popen[bytes]] = []
        self._ends: dict[int, str] = {}  # of those that have ended: why, where they said it
        if command is not None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
            os.environ |= {**place, "RANK": "0", "LOCAL_RANK": "0"}
            for rank in range(1, size):
                named = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._started.append(  # its input is open as long as this process lives; Ctrl-C is not for it
                    subprocess.Popen(
                        command, env=named, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                    )
                )
        self.rank = int(os.environ["RANK"])
        with self.watched():
            self._alive(self._meet)

    @property
    def device(self) -> int | Literal["cpu"]:
        """Where this rank computes: on the GPU of its number on this machine, or on the CPU."""
        return int(os.environ["LOCAL_RANK"]) if self.gpu else "cpu"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Do something together with the other ranks.

        Raises EngineError where one of them ends or this one fails, and from then on: the others wait for its part.
        """
        if self.lost is not None:
            raise self._ended_for_good()
        try:
            yield
        except (RuntimeError, OSError) as error:
            deadline = time.monotonic() + _END  # for the system to know who has ended
            while self._started and self._ended() is None and time.monotonic() < deadline:
                time.sleep(_GLANCE)
            self.lost = self._reason(error)
            raise self._ended_for_good() from None
        except BaseException as error:
            self.lost = self._cannot_go_on(error)
            raise

    def _ended_for_good(self) -> EngineError:
        return EngineError(f"{self._folder}: {self.lost}; start all ranks again")

    def _cannot_go_on(self, error: BaseException) -> str:
        return f"rank {self.rank} of {self.size} cannot go on ({first_line(error)})"

    def _meet(self) -> None:
        distributed = self._distributed
        backend = "cpu:gloo,cuda:nccl" if self.gpu else "gloo"
        self._together(distributed.init_process_group, backend, timeout=_PATIENCE)
        self._words = self._together(distributed.new_group, backend="gloo", timeout=_SILENCE)

    def _together(self, do: Callable[..., Any], *arguments: Any, **choices: Any) -> Any:
        """Do something that all ranks do. Raises _ApartError."""
        try:
            return do(*arguments, **choices)
        except RuntimeError as error:
            raise _ApartError(str(error)) from error

    def _alive(self, meet: Callable[[], None]) -> None:
        """Do what waits for all ranks, and would wait for one that has ended. Raises RuntimeError where one has."""
        failed: list[BaseException] = []

        def meeting() -> None:
            try:
                meet()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=meeting, daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(_GLANCE)
            except BaseException:  # did the others come while Python ends, the thread would abort the process
                for process in self._started:
                    process.kill()
                thread.join(_GLANCE)
                raise
            if thread.is_alive() and (ended := self._ended()):
                raise RuntimeError(ended)
        if failed:
            raise failed[0]

    def _ended(self) -> str | None:
        """The first of the ranks started here that has ended, and how; None where all run.

        One that has said why comes before those that have ended for want of it.
        """
        for number, process in enumerate(self._started, 1):
            if process.poll() is not None and number not in self._ends:
                assert process.stdout is not None
                self._ends[number] = process.stdout.read().decode(errors="replace").strip()
        for number, said in sorted(self._ends.items(), key=lambda end: not end[1]):
            how = said or f"exit code {self._started[number - 1].returncode}"
            return f"rank {number} of {self.size} has ended ({how})"
        return None

    def _reason(self, error: Exception) -> str:
        if (ended := self._ended()) is not None:
            return ended
        # Where the others live it is this one that has failed, and they wait for it for good.
        if self._started or not isinstance(error, _ApartError):
            return self._cannot_go_on(error)
        return f"another of {self.size} ranks has ended ({first_line(error)})"

    def add(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place of each."""
        self._together(self._distributed.all_reduce, x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors in the order of the ranks, (ranks, ...)."""
        import torch

        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._together(self._distributed.all_gather, list(gathered.unbind()), x.contiguous())
        return gathered

    def agree(self, number: int) -> int:
        """Rank 0's number, for all."""
        if self.rank == 0:
            self.tell(number)
            return number
        return int(self.hear())

    def tell(self, message: Any) -> None:
        """Say something to all others; rank 0 alone does."""
        self._broadcast(pickle.dumps(message))

    def hear(self) -> Any:
        """What rank 0 says next."""
        return pickle.loads(self._broadcast(None))

    def _broadcast(self, data: bytes | None) -> bytes:
        import torch

        length = torch.tensor([0 if data is None else len(data)])
        self._together(self._distributed.broadcast, length, 0, group=self._words)
        content = torch.empty(int(length), dtype=torch.uint8)
        if data is not None:
            content.numpy()[:] = np.frombuffer(data, np.uint8)
        self._together(self._distributed.broadcast, content, 0, group=self._words)
        return content.numpy().tobytes()

    def close(self) -> None:
        """End the others; they are killed where they do not listen."""
        if not self._started:
            with contextlib.suppress(RuntimeError):
                self.tell(None)
        for process in self._started:
            assert process.stdin is not None
            process.stdin.close()
        self.leave()
        deadline = time.monotonic() + _END
        for process in self._started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def leave(self) -> None:
        """Say no more to the others. As Python ends, a thread of gloo that still frees a tensor aborts the process."""
        with contextlib.suppress(RuntimeError):
            self._distributed.destroy_process_group()
        del self._words  # its threads end with it


def join(folder: Path, info: EngineInfo, size: int | None, device: int | str | None) -> Ranks | None:
    """The ranks that this process shall be one of: torchrun's, or those that it starts; None for one alone.

    Raises:
        RequestError: torchrun has started another number or set half of what it sets, the model cannot be split so, or
            the device is another GPU than this rank's.
        EngineError: the ranks cannot reach each other.
    """
    import torch

    world = _world()
    if world > 1 and size not in (None, world):
        raise RequestError(f"--tp-size is {size} and torchrun has started {world} ranks; leave --tp-size out")
    size = world if world > 1 else size or 1
    if size == 1:
        return None
    _check(info.model, size, info.build.quantization)
    own = int(os.environ["LOCAL_RANK"]) if world > 1 else 0
    if device not in (None, "cpu", 0, own):
        raise RequestError(
            f"--device is cuda:{device}, allowed with {size} ranks: cpu or cuda, as each takes the GPU of its number; "
            "choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = device != "cpu" and (device is not None or count > 0)
    if gpu and size > count:
        raise RequestError(f"--tp-size is {size}, allowed on GPUs: up to {count}, one for each; or give --device cpu")
    words = [sys.executable, "-m", "nemodiff.runtime.engines.torch.rank", str(folder), *([] if gpu else ["cpu"])]
    return Ranks(folder, size, gpu, None if world > 1 else words)


def _world() -> int:
    """How many ranks torchrun has started; 1 without it. Raises RequestError."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name, "")
        if not value or not (value.isdecimal() or name == "MASTER_ADDR"):
            raise RequestError(
                f"RANK is set as by torchrun, but {name} is {value!r}; start the ranks with torchrun, or unset RANK"
            )
    return int(os.environ["WORLD_SIZE"])


def _check(model: ModelConfig, size: int, quantization: Quantization | None) -> None:
    """Refuse a number of ranks that does not divide the model. Raises RequestError."""
    if size not in model.splits:
        raise RequestError(
            f"--tp-size is {size}, allowed: {', '.join(map(str, model.splits))}, which divide the model's "
            f"{model.num_kv_heads} key/value heads and its inner size of {model.intermediate_size}; choose one of them"
        )
    if quantization == "fp8_dynamic":  # a token's scale would come from a rank's share of it
        raise RequestError(f"--tp-size is {size}, allowed with fp8_dynamic: 1; build with --quantization fp8")
    step = QUANTIZED_INPUTS[quantization] if quantization else 1
    for inputs in (model.num_heads * model.head_dim, model.intermediate_size):  # of o and down, which are split
        if inputs // size % step:
            raise RequestError(
                f"--tp-size is {size}, allowed: one that splits the {inputs} inputs of an {quantization} projection "
                f"into multiples of {step}; choose a smaller one, or build without --quantization"
            )
