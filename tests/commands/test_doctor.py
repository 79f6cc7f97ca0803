"""`nemodiff doctor`: every state of a line, libraries that crash or hang, and what it prints."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

import nemodiff
from nemodiff import main_memory
from nemodiff.cli import main
from nemodiff.doctor import diagnose as doctor
from nemodiff.doctor import packages
from nemodiff.doctor.check import Check
from nemodiff.errors import EngineError
from nemodiff.plugins.tensorrt.api import RTX_SMS, load

ROOT = Path(__file__).parents[2]
HEALTHY: dict[str, dict[str, Any]] = {
    "onnxruntime": {"version": "1.32.0"},
    "torch": {"version": "2.13.0", "cuda": "13.0", "gpus": ["NVIDIA L4"]},
    "triton": {"version": "3.9.0", "ptxas": "12.9"},
    "tensorrt_rtx": {"version": "1.7.1.116", "sms": [80, 86, 89, 120]},
    "tensorrt": {"missing": True},
    "driver": {"version": "580.159", "cuda": "13.0", "gpus": [{"name": "NVIDIA L4", "sm": 89, "bytes": 24 * 2**30}]},
}


def diagnosed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **changes: dict[str, Any]) -> dict[str, Check]:
    found = {**HEALTHY, **changes}
    monkeypatch.setattr(doctor, "_probe", found.__getitem__)
    return {check.name: check for check in doctor.diagnose(tmp_path)}


def test_a_healthy_machine_says_what_it_builds_and_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = diagnosed(monkeypatch, tmp_path)
    assert {name for name, check in checks.items() if check.state == "wrong"} == set()
    assert checks["GPU 0"].found == "NVIDIA L4, SM 89, 24.0 GiB, for torch, tensorrt-rtx"
    assert checks["NVIDIA driver"].found == "580.159, for CUDA 13.0"
    assert checks["Triton"].found == "3.9.0, ptxas 12.9"
    assert checks["TensorRT"] == Check("TensorRT", "missing", "not installed", "pip install tensorrt-cu13")
    assert "processor" in checks["machine"].found
    for check in checks.values():
        assert bool(check.remedy) == (check.state != "ok")


def test_no_card_and_nothing_that_needs_one_is_looked_for_on_another_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everywhere = set(diagnosed(monkeypatch, tmp_path))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    absent = everywhere - set(diagnosed(monkeypatch, tmp_path))
    assert absent == {"Triton", "TensorRT-RTX", "TensorRT", "NVIDIA driver", "GPU 0", "Triton server"}


def test_a_card_that_nothing_here_can_use_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    h100 = {"version": None, "cuda": "13.0", "gpus": [{"name": "NVIDIA H100", "sm": 90, "bytes": 80 * 2**30}]}
    checks = diagnosed(monkeypatch, tmp_path, driver=h100, torch={"version": "2.13.0+cpu", "cuda": None, "gpus": []})
    assert (checks["GPU 0"].state, checks["torch"].state) == ("missing", "ok")
    assert checks["GPU 0"].remedy == "install a torch with CUDA: pip install --force-reinstall torch"
    blind = {"version": "2.11.0+cu130", "cuda": "13.0", "gpus": []}
    checks = diagnosed(monkeypatch, tmp_path, driver=h100 | {"cuda": "12.4"}, torch=blind)
    assert (checks["GPU 0"].state, checks["torch"].state) == ("missing", "ok")
    assert checks["GPU 0"].remedy == "update NVIDIA's driver, which is for CUDA 12.4, to one for torch's CUDA 13.0"
    checks = diagnosed(monkeypatch, tmp_path, driver=h100, torch={"missing": True})
    assert checks["GPU 0"].remedy == 'pip install "nemodiff[torch]"'
    checks = diagnosed(monkeypatch, tmp_path, driver={"error": "cuInit fails with code 999"})
    assert (checks["NVIDIA driver"].state, checks["NVIDIA driver"].found) == ("wrong", "cuInit fails with code 999")


def test_tensorrt_rtx_builds_for_what_a_build_takes() -> None:
    """The library lists SM 75 too, for which it compiles no bf16."""
    assert doctor._probe("tensorrt_rtx")["sms"] == list(RTX_SMS)
    assert load("tensorrt-rtx", EngineError).sms() == RTX_SMS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import os; os.abort()", "crashes when it is imported (SIGABRT)"),
        ("import time; time.sleep(60)", "does not answer within 2 seconds"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
    ],
)
def test_a_library_that_is_broken_is_wrong_and_does_not_break_the_doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, found: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    if "sleep" in source:
        monkeypatch.setattr(doctor, "_PATIENCE", 2)
    probed = doctor._probe("tensorrt")
    assert str(probed["error"]).startswith(found)
    check = diagnosed(monkeypatch, tmp_path, tensorrt=probed)["TensorRT"]
    assert (check.state, check.remedy) == ("wrong", "pip install --force-reinstall tensorrt-cu13")


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (
            "onnxruntime",
            "class InferenceSession:\n    def __init__(self, *a, **b): raise RuntimeError('no kernel for Add')\n",
            "RuntimeError: no kernel for Add",
        ),
        (
            "torch",
            "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 1)\n"
            "def ones(size, device):\n    if device == 'cpu': return __import__('numpy').ones(size)\n"
            "    raise RuntimeError('no kernel image is available for execution on the device')\n",
            "RuntimeError: no kernel image is available for execution on the device",
        ),
    ],
    ids=["onnxruntime", "torch"],
)
def test_a_library_that_is_imported_and_computes_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, source: str, found: str
) -> None:
    (tmp_path / f"{module}.py").write_text(f"__version__ = '1.0'\n{source}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert doctor._probe(module) == {"error": found}


DRIVER = """
#include <string.h>
int cuInit(int f) { return 0; }
int cuDriverGetVersion(int *v) { *v = 13020; return 0; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, d ? "B" : "A"); return 0; }
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 + d : 9; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *s, int n) { strcpy(s, "580.159"); return 0; }
"""


def test_the_driver_is_asked_for_its_version_and_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for a stand-in of the driver")
    (tmp_path / "driver.c").write_text(DRIVER)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / name), str(tmp_path / "driver.c")]
        subprocess.run(command, check=True, timeout=60)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path), prepend=":")
    found = {"version": "580.159", "cuda": "13.2"}
    cards = [{"name": name, "sm": sm, "bytes": 24 * 2**30} for name, sm in (("A", 89), ("B", 99))]
    assert doctor._probe("driver") == {**found, "gpus": cards}
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    assert doctor._probe("driver")["version"] is None
    (tmp_path / "driver.c").write_text("int cuInit(int f) { return 0; }")
    subprocess.run([compiler, "-shared", "-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "driver.c")], check=True)
    assert "undefined symbol: cuDriverGetVersion" in doctor._probe("driver")["error"]


def test_little_disk_and_little_memory_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "disk_free", lambda folder: 5 * 2**20)
    monkeypatch.setattr(main_memory, "free", lambda: 5 * 2**20)
    checks = diagnosed(monkeypatch, tmp_path)
    assert (checks["disk"].state, checks["memory"].state) == ("wrong", "wrong")
    assert "5.0 MiB free" in checks["disk"].found


def test_memory_is_what_the_container_may_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = main_memory.free()
    assert everything is not None
    assert everything > 2**28
    monkeypatch.setattr(main_memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{200 * 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {40 * 2**20}\n")
    (tmp_path / "memory.max").write_text(f"{256 * 2**20}\n")
    check = diagnosed(monkeypatch, tmp_path)["memory"]
    assert (check.state, check.found) == ("wrong", "96.0 MiB free")
    (tmp_path / "memory.max").write_text("max\n")
    assert diagnosed(monkeypatch, tmp_path)["memory"].state == "ok"


def test_packages_are_held_against_what_is_declared() -> None:
    extras = {
        "": [Requirement("numpy>=2.0"), Requirement("nowhere-to-be-found")],
        "torch": [Requirement("numpy<1"), Requirement("packaging>=1")],
        "trt": [Requirement("nowhere-to-be-found==3")],
        "serve": [Requirement("packaging>=1")],
        "elsewhere": [],
        "test": [Requirement("nowhere-to-be-found")],
    }
    checks = {check.name: check for check in packages.package_checks(extras)}
    assert {name: check.state for name, check in checks.items()} == {
        "packages": "wrong",
        "extra torch": "wrong",
        "extra trt": "missing",
        "extra serve": "ok",
    }
    assert checks["extra torch"].remedy == 'pip install "numpy<1"'
    assert 'pip install "nemodiff[trt]"' in checks["extra trt"].remedy
    assert packages.python_check(">=3.99").state == "wrong"


@pytest.mark.parametrize(
    ("torch", "state", "remedy"),
    [("2.11.0+cu130", "ok", ""), ("2.4.1", "wrong", 'pip install "torch>=2.5"')],
)
def test_a_torch_that_works_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, torch: str, state: str, remedy: str
) -> None:
    """Here another version may be pinned, for tests and benchmarks, which doctor does not ask for."""
    _, extras = packages.declared()
    versions = {"torch": torch, "transformers": "5.0"}
    monkeypatch.setattr(packages, "version", versions.get)
    (check,) = packages.package_checks({"torch": extras["torch"]})
    assert (check.state, check.remedy) == (state, remedy)
    needed = [one for name, wanted in extras.items() if name not in packages.DEVELOPMENT for one in wanted]
    assert all(one.specifier.contains("2.11.0") for one in needed if one.name == "torch")


def test_what_is_declared_comes_from_pyproject_or_from_the_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted, extras = packages.declared()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert wanted == project["requires-python"]
    assert set(extras) == {"", *project["optional-dependencies"]}
    (tmp_path / "demo-1.dist-info").mkdir()
    (tmp_path / "demo-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demo\nVersion: 1\nRequires-Python: >=3.11\nProvides-Extra: serve\n"
        'Requires-Dist: click>=8\nRequires-Dist: uvicorn>=0.3; extra == "serve"\n'
    )
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    monkeypatch.setattr(packages, "_ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: distribution.metadata)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: distribution.requires)
    wanted, extras = packages.declared()
    assert wanted == ">=3.11"
    assert {name: [one.name for one in found] for name, found in extras.items()} == {
        "": ["click"],
        "serve": ["uvicorn"],
    }


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_prints_lines_or_json_and_fails_if_anything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, not_installed: None, broken: bool
) -> None:
    found = {**HEALTHY, **({"onnxruntime": {"error": "OSError: \x1b[1mno"}} if broken else {})}
    monkeypatch.setattr(doctor, "_probe", found.__getitem__)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    value = json.loads(result.stdout)
    assert (result.exit_code, value["ok"], value["nemodiff"]) == (int(broken), not broken, nemodiff.__version__)
    assert {check["state"] for check in value["checks"]} <= {"ok", "missing", "wrong"}
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == int(broken)
    assert result.stdout.isascii()
    assert ("wrong    ONNX Runtime   OSError: \\x1b[1mno; pip install" in result.stdout) == broken


def test_the_real_probes_answer() -> None:
    assert doctor._probe("onnxruntime")["version"]
    assert doctor._probe("driver").keys() & {"missing", "cuda", "error"}
