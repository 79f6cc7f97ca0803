"""Looks at one library in a process of its own, since a broken one may crash or hang: `python -m ... NAME`.

It prints one JSON object: what was found, or `error`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def onnxruntime() -> dict[str, Any]:
    """ONNX Runtime, which must run a graph."""
    module = importlib.import_module("onnxruntime")
    model = importlib.import_module("onnx.parser").parse_model(
        '<ir_version: 8, opset_import: ["": 17]> sum (float[2] x) => (float[2] y) { y = Add(x, x) }'
    )
    session = module.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": importlib.import_module("numpy").ones(2, "float32")})
    if found.tolist() != [2.0, 2.0]:
        return {"error": f"computes 1 + 1 = {found[0]}"}
    return {"version": module.__version__}


def torch() -> dict[str, Any]:
    """torch, and the GPUs that it can use: a wheel may have no kernels for a card that it finds."""
    module = importlib.import_module("torch")
    available = module.cuda.is_available()
    numbers = range(module.cuda.device_count()) if available else ()
    for device in ("cpu", *(f"cuda:{number}" for number in numbers)):
        float(module.ones(2, device=device).sum())
    names = [module.cuda.get_device_name(number) for number in numbers]
    return {"version": module.__version__, "cuda": module.version.cuda, "gpus": names}


def triton() -> dict[str, Any]:
    """The Triton compiler and its assembler."""
    module = importlib.import_module("triton")
    compiler = importlib.import_module("triton.backends.nvidia.compiler")
    assembler = compiler.get_ptxas(80) if compiler.get_ptxas.__code__.co_argcount else compiler.get_ptxas()
    path = getattr(assembler, "path", assembler)
    output = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=30).stdout
    release = next((line for line in output.splitlines() if "release" in line), "").partition("release ")[2]
    return {"version": module.__version__, "ptxas": release.partition(",")[0] or None}


def tensorrt_rtx() -> dict[str, Any]:
    """TensorRT-RTX, and the cards that it builds for."""
    from ..plugins.tensorrt.api import buildable_sms

    module = importlib.import_module("tensorrt_rtx")
    return {"version": module.__version__, "sms": buildable_sms(module)}


def tensorrt() -> dict[str, Any]:
    """The full TensorRT."""
    return {"version": importlib.import_module("tensorrt").__version__}


def driver() -> dict[str, Any]:
    """The NVIDIA driver and its GPUs, asked without any package."""
    cuda = ctypes.CDLL("libcuda.so.1")
    code = cuda.cuInit(0)
    if code:
        return {"error": f"cuInit fails with code {code}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = []
    for number in range(count.value):
        name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetName(name, 128, number)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(total), number)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, number)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, number)
        gpus.append({"name": name.value.decode(), "sm": 10 * major.value + minor.value, "bytes": total.value})
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {"version": _driver_version(), "cuda": cuda_version, "gpus": gpus}


def _driver_version() -> str | None:
    """The driver's own version, which its management library knows."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    return None if failed else text.value.decode()


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    probe.__name__: probe for probe in (onnxruntime, torch, triton, tensorrt_rtx, tensorrt, driver)
}


def main(name: str) -> None:
    """Print what a probe finds."""
    try:
        found = PROBES[name]()
    except ModuleNotFoundError as error:
        # Only the library itself: one that lacks another is broken.
        found = {"missing": True} if error.name == name else {"error": str(error)}
    except Exception as error:  # whatever a broken library raises
        found = (
            {"missing": True}
            if name == "driver" and isinstance(error, OSError)
            else {"error": f"{type(error).__name__}: {error}"}
        )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
