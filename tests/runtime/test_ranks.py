"""Tensor parallelism over gloo: the tokens of one rank in every mode, and one line where a rank dies."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import PATIENCE, Refused, assert_one_line, eventually
from stand_ins.http_server import Served, serving
from stand_ins.torch_ranks import answers, build

import nemodiff
from nemodiff.builder.build import Builder
from nemodiff.engine_info import read_engine
from nemodiff.errors import EngineError, RequestError
from nemodiff.runtime.engines.torch import rank, ranks
from nemodiff.runtime.engines.torch.engine import TorchEngine
from nemodiff.runtime.engines.torch.flat import FlatShape
from nemodiff.runtime.engines.torch.ranks import Ranks, join
from nemodiff.runtime.engines.torch.step import SharedForward, Step

torch = pytest.importorskip("torch")
# No end token is allowed, and the text comes as it is decided.
ENDLESS = ("--max-new-tokens", "9000", "--stream", "--logit-bias", "1=-100", "--logit-bias", "2=-100")


@contextlib.contextmanager
def as_rank_0() -> Iterator[None]:
    """This process may become rank 0, and waits for others no longer than a test does."""
    soon = datetime.timedelta(seconds=PATIENCE)
    with mock.patch.dict(os.environ), mock.patch.multiple(ranks, _PATIENCE=soon, _SILENCE=soon):
        yield


@contextlib.contextmanager
def over_ranks(engine: Path, size: int) -> Iterator[nemodiff.LoadedEngine]:
    """An engine whose rank 0 is this process, which has imported torch already; that takes a rank longest."""
    with as_rank_0():
        loaded = nemodiff.load(engine, threads=1, device="cpu", tp_size=size)
        assert isinstance(loaded.backend, TorchEngine)
        assert loaded.backend.ranks is not None
        atexit.unregister(loaded.backend.ranks.close)
        with contextlib.closing(loaded.backend.ranks):
            yield loaded


@pytest.mark.long
@pytest.mark.parametrize(
    ("choices", "ranks"),
    [({"quantization": "fp8", "kv_cache_dtype": "int8"}, 4), ({"quantization": "int4"}, 2)],
    ids=str,
)
def test_ranks_give_the_tokens_of_one(tmp_path: Path, choices: dict[str, Any], ranks: int) -> None:
    """In every mode; `test_torchrun_starts_the_ranks` splits weights of full width."""
    engine = build(tmp_path, **choices)
    alone = answers(nemodiff.load(engine, threads=1, device="cpu"))
    with over_ranks(engine, ranks) as split:
        assert isinstance(split.backend, TorchEngine)
        split.backend.forwards.ahead = True  # as on GPUs
        shared = answers(split)
    for name in ("alone", "together", "sampled"):
        assert shared[name] == alone[name], name
    assert shared["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stand_ins.checkpoints import TINY_CHAT

    return Builder(TINY_CHAT, tmp_path_factory.mktemp("tiny") / "engine", backend="torch", dtype="f32").run()


def test_a_rank_starts_a_forward_while_the_one_before_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So rank 0, which waits until it is heard, runs a pass ahead."""
    engine = TorchEngine(tiny, read_engine(tiny), "cpu", pages=8)
    happened = list[str]()
    shapes = [FlatShape(count, count) for count in (1, 2, 3)]
    forwards: list[SharedForward | None] = [SharedForward(shape, 0, False, 0, b"", None, []) for shape in shapes]
    ranks = SimpleNamespace(hear=iter([*forwards, None]).__next__)
    monkeypatch.setattr(Step, "mirror", lambda step, forward, _: happened.append(f"start {forward.shape.tokens}"))
    monkeypatch.setattr(engine.device, "mark", lambda: next(e for e in reversed(happened) if e.startswith("start ")))
    monkeypatch.setattr(engine.device, "wait", lambda mark: happened.append(f"end of {mark}"))
    engine.forwards.mirror(ranks)  # type: ignore[arg-type]
    assert happened == ["start 1", "end of None", "start 2", "end of start 1", "start 3", "end of start 2"]


def test_a_rank_waits_for_a_word_however_long_and_leaves_no_thread_of_gloo() -> None:
    """A server that nobody uses overnight; only the sums of a forward have to come in time."""
    program = """
import datetime, os, pathlib, time
import torch
from nemodiff.runtime.engines.torch import ranks
ranks._PATIENCE = datetime.timedelta(seconds=1)
before = os.listdir("/proc/self/task")
here = ranks.Ranks(pathlib.Path("engine"), 2, False, None)
if here.rank == 0:
    time.sleep(2.5)
    here.tell("a word")
else:
    print(here.hear())
here.agree(3)
here.add(torch.ones(1))
here.leave()
for _ in range(1000):  # those that have been joined are listed a moment longer
    if os.listdir("/proc/self/task") == before:
        break
    time.sleep(0.01)
else:
    raise AssertionError
"""
    assert said_by_ranks(program) == ["", "a word\n"]


def test_a_rank_of_torchrun_says_its_own_error() -> None:
    program = """
import pathlib
import torch
from nemodiff.errors import EngineError
from nemodiff.runtime.engines.torch.ranks import Ranks
here = Ranks(pathlib.Path("engine"), 2, False, None)
try:
    with here.watched():
        if here.rank == 1:
            raise RuntimeError("a kernel is broken\\nand more lines")
        here.add(torch.ones(1))
except EngineError as error:
    print(error, flush=True)
here.leave()
"""
    other, broken = said_by_ranks(program)
    assert broken == "engine: rank 1 of 2 cannot go on (a kernel is broken); start all ranks again\n"
    assert other.startswith("engine: another of 2 ranks has ended (")


@contextlib.contextmanager
def two_ranks(*words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Both ranks of a Python program, with what torchrun tells them; it would take as long to start as one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *words],
                    env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in "01"
        ]


def said_by_ranks(program: str) -> list[str]:
    """What each of two ranks prints."""
    with two_ranks("-c", program) as ranks:
        told = [process.communicate(timeout=PATIENCE) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    return [printed for printed, _ in told]


def command(engine: Path, *words: str) -> list[str]:
    return ["-m", "nemodiff", "run", str(engine), "--device", "cpu", "-p", "Count from 3 to 9.", "--mode", "ar", *words]


def test_a_rank_that_dies_ends_all_with_one_line(tiny: Path) -> None:
    words = [sys.executable, *command(tiny, "--tp-size", "2", *ENDLESS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) != ""  # it answers
        (rank,) = ranks_of(process)
        os.kill(rank, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert_one_line(said, "rank 1 of 2 has ended (exit code -9)", "start all ranks again")


def test_a_rank_that_fails_alone_says_why(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing = f"""
import sys
from nemodiff.errors import EngineError
from nemodiff.runtime.engines.torch import rank

def fail(*arguments):
    print("not for rank 0")
    raise EngineError("no room on its card")

rank._mirror = fail
sys.argv = ["rank", {str(tiny)!r}, "cpu"]
rank.main()
"""
    with as_rank_0():
        here = Ranks(Path("engine"), 2, False, [sys.executable, "-c", failing])

    def together() -> None:
        with here.watched():
            here.tell("a word")
            here.agree(1)
            here.add(torch.ones(1))

    with contextlib.closing(here), pytest.raises(EngineError) as failed:
        together()
    assert str(failed.value) == "engine: rank 1 of 2 has ended (no room on its card); start all ranks again"
    assert "not for rank 0" in capfd.readouterr().err


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def interrupted(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("stops", "said"),
    [(out_of_memory, "CUDA out of memory. Tried to allocate 2.00 GiB."), (interrupted, "KeyboardInterrupt")],
    ids=["memory", "Ctrl-C"],
)
def test_what_stops_rank_0_is_said_of_it_and_of_every_request_after_it(
    tiny: Path,
    stops: Callable[..., None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The others wait in a sum for its part, and would add the next pass's to it."""
    monkeypatch.setattr(ranks, "_END", 0.5)
    why = f"rank 0 of 2 cannot go on ({said})"
    with over_ranks(tiny, 2) as engine:
        with monkeypatch.context() as stopping:
            stopping.setattr(Ranks, "add", stops)
            with pytest.raises((EngineError, KeyboardInterrupt)):
                nemodiff.generate(engine, "x")
        with pytest.raises(EngineError) as refused:
            nemodiff.generate(engine, "x")
        assert str(refused.value) == f"{tiny}: {why}; start all ranks again"
        assert engine.lost == why
    assert capfd.readouterr() == ("", "")


def test_a_rank_ends_in_silence_while_a_thread_of_gloo_frees_a_tensor() -> None:
    """Which takes Python's lock, and aborts the process where Python is ending."""
    other = """
import pathlib, sys, time, weakref
import torch
from nemodiff.runtime.engines.torch import rank, ranks

def linger(freed):
    while True:
        time.sleep(0.01)

def mirror(folder, info, here):
    global kept
    summed = torch.ones(1)
    kept = weakref.ref(summed, linger)
    torch.distributed.all_reduce(summed, async_op=True)
    del summed
    here.hear()
    here.hear()  # fails

rank.read_engine = lambda folder: None
rank.join = lambda *arguments: ranks.Ranks(pathlib.Path("engine"), 2, False, None)
rank._end_with_input = lambda: None  # the sum fails first
rank._mirror = mirror
sys.argv = ["rank", "engine", "cpu"]
rank.main()
"""
    program = f"""
import os, pathlib, sys
from nemodiff.runtime.engines.torch.ranks import Ranks
Ranks(pathlib.Path("engine"), 2, False, [sys.executable, "-c", {other!r}]).tell("a word")
os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")  # the other's standard error is the same


def test_ranks_that_are_interrupted_while_they_meet_do_not_meet_as_python_ends(tmp_path: Path) -> None:
    ending = str(tmp_path / "ending")
    other = f"""
import os, pathlib, time
import torch
from nemodiff.runtime.engines.torch import ranks
while not os.path.exists({ending!r}):
    time.sleep(0.01)
ranks.Ranks(pathlib.Path("engine"), 2, False, None)
"""
    program = f"""
import os, pathlib, signal, sys, time
from nemodiff.runtime.engines.torch import ranks

class Slow:
    def __del__(self, mkdir=os.mkdir, sleep=time.sleep):
        mkdir({ending!r})
        sleep(1)

slow = Slow()
signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))
signal.setitimer(signal.ITIMER_REAL, 4)
ranks.Ranks(pathlib.Path("engine"), 2, False, [sys.executable, "-c", {other!r}])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (3, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ranks_on_gpus_that_are_not_there(tiny: Path, refused: Refused) -> None:
    words = ["run", str(tiny), "-p", "x", "--device", "cuda", "--tp-size", "2"]
    refused(words, "--tp-size is 2, allowed on GPUs: up to 0, one for each; or give --device cpu")


def test_a_rank_takes_the_gpu_of_its_number(tiny: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", str(tiny), "-p", "x", "--device", "cuda:1", "--tp-size", "2"]
    refused(words, "--device is cuda:1, allowed with 2 ranks: cpu or cuda", "choose GPUs by CUDA_VISIBLE_DEVICES")
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    info = read_engine(tiny)
    with pytest.raises(RequestError, match=r"--device is cuda:2, allowed with 2 ranks"):
        join(tiny, info, None, 2)
    with pytest.raises(RequestError, match="up to 0"):  # its own is not refused as another one
        join(tiny, info, None, 1)


def test_a_command_over_ranks_leaves_nothing_open(tiny: Path) -> None:
    words = [sys.executable, "-W", "error", *command(tiny, "--tp-size", "2", "--max-new-tokens", "2")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that rank 0 has started so far."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if runs(child)]


@pytest.mark.parametrize("dying", ["the other", "rank 0"])
def test_a_rank_that_dies_before_they_have_met(tiny: Path, dying: str) -> None:
    words = [sys.executable, *command(tiny, "--tp-size", "2")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: bool(ranks_of(process)))
        (rank,) = ranks_of(process)
        os.kill(rank if dying == "the other" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)  # the other's standard error is the same
    if dying == "the other":
        assert process.returncode == 1
        assert_one_line(said, "rank 1 of 2 has ended (exit code -9)", "start all ranks again")
    eventually(lambda: not runs(str(rank)))


def test_a_rank_that_dies_as_they_meet_to_say_words() -> None:
    """Rank 0 waits for it as long as for a word, unless it looks whether it lives."""
    other = """
import os, pathlib
from torch import distributed
from nemodiff.runtime.engines.torch import ranks
distributed.new_group = lambda **choices: os._exit(7)
ranks.Ranks(pathlib.Path("engine"), 2, False, None)
"""
    program = f"""
import pathlib, sys
from nemodiff.errors import EngineError
from nemodiff.runtime.engines.torch.ranks import Ranks
try:
    Ranks(pathlib.Path("engine"), 2, False, [sys.executable, "-c", {other!r}])
except EngineError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.stdout == "engine: rank 1 of 2 has ended (exit code 7); start all ranks again\n", ended.stderr


@contextlib.contextmanager
def answering(engine: Path, max_tokens: int) -> Iterator[tuple[Served, http.client.HTTPResponse, int]]:
    """A server of two ranks whose stream has begun, the stream, of which a line has been read, and its other rank."""
    with serving(engine, "--device", "cpu", "--tp-size", "2") as served:
        body = {"model": "engine", "prompt": "Count", "max_tokens": max_tokens, "ignore_eos": True, "mode": "ar"}
        with contextlib.closing(served.connect()) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), headers)
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            (rank,) = ranks_of(served.process)
            yield served, answer, rank


def test_signals_to_all_processes_let_a_server_drain(tiny: Path) -> None:
    """As those of a terminal or of a service manager are."""
    with answering(tiny, 100) as (served, answer, rank):
        for process in (rank, served.process.pid):
            os.kill(process, signal.SIGTERM)
        rest = answer.read()
        answer.close()
        assert b'"finish_reason":"length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert served.process.wait(PATIENCE) == 0
        assert not runs(str(rank))


def test_a_second_signal_ends_a_server_and_its_ranks_at_once(tiny: Path) -> None:
    with answering(tiny, 9000) as (served, answer, rank):
        served.process.send_signal(signal.SIGTERM)
        eventually(lambda: served.send("/health/ready")[0] == 503)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""
        answer.close()
    eventually(lambda: not runs(str(rank)))


def test_a_server_says_that_a_rank_is_gone(tiny: Path) -> None:
    with serving(tiny, "--device", "cpu", "--tp-size", "2", warnings="default") as served:
        body = {"model": "engine", "prompt": "Count", "max_tokens": 3}
        assert served.send("/v1/completions", body)[0] == 200
        assert served.ask("/health") == {"status": "ok"}
        (rank,) = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        status, _, content = served.send("/v1/completions", body)
        assert status == 500
        assert b"rank 1 of 2 has ended" in content
        for path in ("/health", "/health/ready"):  # so it is started again, and asked nothing until then
            status, _, content = served.send(path)
            assert (status, json.loads(content)) == (503, {"status": "rank 1 of 2 has ended (exit code -9)"})


def runs(rank: str) -> bool:
    try:
        return "torch.rank" in Path(f"/proc/{rank}/cmdline").read_text()
    except OSError:  # it has ended
        return False


def test_ranks_end_with_rank_0(tiny: Path) -> None:
    words = [sys.executable, *command(tiny, "--tp-size", "2", *ENDLESS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) != ""
        (rank,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    eventually(lambda: not runs(rank))


def test_torchrun_starts_the_ranks(tiny: Path) -> None:
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command(tiny)]
    ended = subprocess.run(started, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    alone = nemodiff.generate(nemodiff.load(tiny, device="cpu", threads=1), "Count from 3 to 9.", mode="ar")
    assert ended.stdout == f"{alone.text}\n"


def test_a_rank_of_torchrun_ends_with_one_line_where_rank_0_dies(tiny: Path) -> None:
    """Its processes are started here one by one: torchrun would kill the other, too."""
    with two_ranks(*command(tiny, *ENDLESS)) as (rank_0, rank_1):
        assert rank_0.stdout is not None
        assert rank_0.stdout.read(4) != ""  # it answers
        rank_0.kill()
        _, said = rank_1.communicate(timeout=PATIENCE)
    assert rank_1.returncode == 1
    assert_one_line(said, "another of 2 ranks has ended (", "start all ranks again")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is ''"),
    ],
)
def test_half_of_what_torchrun_sets_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], said: str
) -> None:
    numbers = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1", **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=f"^RANK is set as by torchrun, but {said}; start the ranks with torchrun"):
        nemodiff.load(tiny, device="cpu")


@pytest.mark.parametrize("size", [0, 3, 64])
def test_numbers_that_do_not_fit(tiny: Path, size: int) -> None:
    with pytest.raises(RequestError, match="allowed: 1"):
        nemodiff.load(tiny, device="cpu", tp_size=size)


@pytest.mark.parametrize(
    ("world", "size", "device", "gpus", "found"),
    [
        (0, None, None, 2, None),
        (0, 1, 0, 2, None),
        (0, 2, None, 0, (2, False)),
        (0, 2, None, 2, (2, True)),
        (0, 2, "cpu", 2, (2, False)),
        (0, 2, 0, 2, (2, True)),
        (0, 2, None, 1, "up to 1, one for each; or give --device cpu"),
        (0, 2, 1, 2, "--device is cuda:1, allowed with 2 ranks"),
        (1, 2, None, 0, (2, False)),
        (2, None, None, 0, (2, False)),
        (2, 2, 1, 2, (2, True)),
        (2, 4, None, 0, "--tp-size is 4 and torchrun has started 2 ranks; leave --tp-size out"),
    ],
)
def test_ranks_are_those_of_torchrun_or_are_started_here(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    size: int | None,
    device: int | str | None,
    gpus: int,
    found: tuple[int, bool] | str | None,
) -> None:
    """world: of torchrun, for its rank 1; 0 without it."""
    if world:
        place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
        for name, value in {**place, "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ranks, "Ranks", lambda *arguments: arguments)
    info = read_engine(tiny)
    if isinstance(found, str):
        with pytest.raises(RequestError, match=found):
            join(tiny, info, size, device)
        return
    made: Any = join(tiny, info, size, device)
    if found is None:
        assert made is None
        return
    command = [sys.executable, "-m", "nemodiff.runtime.engines.torch.rank", str(tiny), *([] if found[1] else ["cpu"])]
    assert made == (tiny, *found, None if world > 1 else command)


@pytest.mark.parametrize(("gpu", "threads", "told"), [(False, None, 3), (False, 5, 5), (True, None, None)])
def test_rank_0_and_the_others_open_their_parts(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, threads: int | None, told: int | None
) -> None:
    """Ranks on CPUs share those of the machine."""
    happened: list[Any] = []

    class Played:
        size, device = 2, "the device"

        def __init__(self, rank: int) -> None:
            self.rank, self.gpu = rank, gpu
            self.watched = contextlib.nullcontext
            self.tell = lambda word: happened.append(f"tell {word}")
            self.hear = lambda: "what is told"
            self.leave = lambda: happened.append("leave")
            self.close = lambda: None

    def made(*arguments: Any, **choices: Any) -> Any:
        happened.append((arguments, choices))
        return SimpleNamespace(mirror=lambda: happened.append("mirror"))

    folder, info, joined = Path("engine"), read_engine, list[Any]()
    monkeypatch.setattr(rank, "TorchEngine", made)
    monkeypatch.setattr(rank.os, "cpu_count", lambda: 7)
    monkeypatch.setattr(rank.atexit, "register", happened.append)
    for number in (0, 1):
        played: Any = Played(number)
        monkeypatch.setattr(rank, "join", lambda *arguments, here=played: joined.append(arguments) or here)
        with pytest.raises(SystemExit) if number else contextlib.nullcontext() as ended:
            rank.open_engine(folder, info, 0, threads, memory=0.5, tp_size=2)  # type: ignore[arg-type]
        if number:
            assert happened == [
                ((folder, info, "the device", "what is told"), {"pages": 1, "ranks": played}),
                "mirror",
                "leave",
            ]
            assert ended is not None
            assert ended.value.code == 0
        else:
            opened = ((folder, info, "the device", told), {"memory": 0.5, "ranks": played})
            assert happened == [f"tell {told}", played.close, opened]
        happened.clear()
    assert joined == [(folder, info, 2, 0)] * 2
    monkeypatch.setattr(rank, "join", lambda *_: None)
    rank.open_engine(folder, info, 0, threads, memory=0.5)  # type: ignore[arg-type]
    assert happened == [((folder, info, 0, threads), {"memory": 0.5})]


def test_a_rank_that_has_said_why_it_ended_is_told_first() -> None:
    def ended(said: bytes) -> Any:
        return SimpleNamespace(poll=lambda: 9, returncode=9, stdout=SimpleNamespace(read=lambda: said))

    here = object.__new__(ranks.Ranks)
    here.size, here._ends = 4, {}
    here._started = [ended(b""), ended(b"no room\n"), ended(b"no card\n")]
    assert here._ended() == "rank 2 of 4 has ended (no room)"
    here._ends = {}
    here._started = [SimpleNamespace(poll=lambda: None), ended(b"")]  # type: ignore[list-item]
    assert here._ended() == "rank 2 of 4 has ended (exit code 9)"


def test_weights_in_full_width_are_split_at_any_number(tiny: Path) -> None:
    odd = dataclasses.replace(read_engine(tiny).model, intermediate_size=6)
    ranks._check(odd, 2, None)
    with pytest.raises(RequestError, match=r"one that splits the .* inputs of an int4 projection into multiples of 32"):
        ranks._check(odd, 2, "int4")


def test_other_backends_have_one_rank(tiny_engine: Path) -> None:
    with pytest.raises(RequestError, match="build it with --backend torch"):
        nemodiff.load(tiny_engine, tp_size=2)
