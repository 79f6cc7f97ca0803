"""What this machine can build and run, line by line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import main_memory
from ..builder.resources import disk_free
from ..contract import counted, size_text
from ..errors import install
from ..serving.triton_server.install import installed
from .check import Check, judged
from .packages import declared, package_checks, python_check
from .probe import PROBES

_PATIENCE = 120  # seconds for a library to be imported
_LITTLE_DISK = 2**30  # bytes
_LITTLE_MEMORY = 2**29
_INSTALL_DRIVER = "install NVIDIA's driver, in a container start it with --gpus all; engines are built without one"


def diagnose(folder: Path) -> list[Check]:
    """Look at everything; `folder` is where engines would be written."""
    with ThreadPoolExecutor(len(PROBES)) as pool:
        probes = {name: pool.submit(_probe, name) for name in PROBES}
        wanted, extras = declared()
        checks = [python_check(wanted), *package_checks(extras)]
        found = {name: probe.result() for name, probe in probes.items()}
    # Elsewhere nemodiff knows no driver, no package that compiles for a card, and no server to install.
    cards = [*_compilers(found), *_gpus(found), _server()] if platform.system() == "Linux" else []
    return [*checks, *_libraries(found), *cards, *_machine(folder)]


def _probe(name: str) -> dict[str, Any]:
    """What a probe prints, or why it did not."""
    command = [sys.executable, "-W", "ignore", "-m", __package__ + ".probe", name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": f"does not answer within {_PATIENCE} seconds"}
    if ended.returncode >= 2**31:  # an NTSTATUS of Windows
        return {"error": f"crashes when it is imported ({ended.returncode:#x})"}
    if ended.returncode < 0:
        return {"error": f"crashes when it is imported ({signal.Signals(-ended.returncode).name})"}
    try:
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": (ended.stderr.strip().splitlines() or ["it prints nothing"])[-1]}
    return found


def _libraries(found: dict[str, dict[str, Any]]) -> list[Check]:
    """What builds and runs engines anywhere."""
    runtime, torch = found["onnxruntime"], found["torch"]
    return [
        _library("ONNX Runtime", runtime, f"{runtime.get('version')}, builds and runs on the CPU", "onnxruntime"),
        _library("torch", torch, _torch_text(torch), "'nemodiff[torch]'"),
    ]


def _compilers(found: dict[str, dict[str, Any]]) -> list[Check]:
    """What compiles for NVIDIA's cards."""
    triton, rtx, full = found["triton"], found["tensorrt_rtx"], found["tensorrt"]
    sms = ", ".join(map(str, rtx.get("sms", ())))
    return [
        _library("Triton", triton, f"{triton.get('version')}, ptxas {triton.get('ptxas')}", "nemodiff[trt]"),
        _library("TensorRT-RTX", rtx, f"{rtx.get('version')}, builds for SM {sms}", "nemodiff[trt]"),
        _library("TensorRT", full, f"{full.get('version')}, builds for the GPU at hand", "tensorrt-cu13"),
    ]


def _library(name: str, found: dict[str, Any], text: str, package: str) -> Check:
    if found.get("missing"):
        return Check(name, "missing", "not installed", install(package))
    if "error" in found:
        return Check(name, "wrong", str(found["error"]), install(package, "--force-reinstall"))
    return Check(name, "ok", text)


def _torch_text(torch: dict[str, Any]) -> str:
    where = ", ".join(torch["gpus"]) if torch.get("gpus") else "the CPU"
    return f"{torch.get('version')}, CUDA {torch.get('cuda') or 'none'}, runs on {where}"


def _gpus(found: dict[str, dict[str, Any]]) -> list[Check]:
    """Driver and cards, and whether what was found can use them."""
    driver = found["driver"]
    if driver.get("missing"):
        return [Check("NVIDIA driver", "missing", "none here", _INSTALL_DRIVER)]
    if "error" in driver or not driver["gpus"]:
        reason = driver.get("error", "it finds no GPU")
        return [Check("NVIDIA driver", "wrong", str(reason), "look at nvidia-smi and dmesg, then install it again")]
    checks = [Check("NVIDIA driver", "ok", f"{driver['version'] or 'version unknown'}, for CUDA {driver['cuda']}")]
    sms = found["tensorrt_rtx"].get("sms", [])
    for number, gpu in enumerate(driver["gpus"]):
        runs = [
            *(["torch"] if found["torch"].get("gpus") else []),
            *(["tensorrt-rtx"] if gpu["sm"] in sms else []),
            *(["tensorrt"] if "version" in found["tensorrt"] else []),
        ]
        text = f"{gpu['name']}, SM {gpu['sm']}, {size_text(gpu['bytes'])}"
        if runs:
            checks.append(Check(f"GPU {number}", "ok", f"{text}, for {', '.join(runs)}"))
        else:
            remedy = _torch_remedy(found["torch"], driver["cuda"])
            checks.append(Check(f"GPU {number}", "missing", f"{text}, and no library that uses it", remedy))
    return checks


def _torch_remedy(torch: dict[str, Any], cuda: str) -> str:
    """What lets torch use a card; one that is made for CUDA is never replaced by another."""
    if "version" not in torch:
        return install("nemodiff[torch]")
    if torch.get("cuda"):
        return f"update NVIDIA's driver, which is for CUDA {cuda}, to one for torch's CUDA {torch['cuda']}"
    return f"install a torch with CUDA: {install('torch', '--force-reinstall')}"


def _server() -> Check:
    """Triton Inference Server."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Check("Triton server", "ok", on_path)
    if installed():
        return Check("Triton server", "ok", "installed by nemodiff, for the CPU")
    return Check("Triton server", "missing", "no tritonserver on PATH", "nemodiff triton install")


def _machine(folder: Path) -> list[Check]:
    """Processor, memory and disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks = [Check("machine", "ok", f"{platform.system()} {platform.machine()}, {counted(cores or 1, 'processor')}")]
    free = main_memory.free()
    if free is not None:
        remedy = "close other programs; see what fits: nemodiff build CHECKPOINT -o ENGINE --dry-run"
        checks.append(judged("memory", free >= _LITTLE_MEMORY, f"{size_text(free)} free", remedy))
    space = disk_free(folder)
    remedy = f"free some space, or build into another folder than {folder}"
    return [*checks, judged("disk", space >= _LITTLE_DISK, f"{size_text(space)} free in {folder}", remedy)]
