"""Plugin registrations that `builder/compilers/compile.py` calls instead of the product's own: partial or failing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nemodiff.plugins import OPS
from nemodiff.plugins.op import stage_op
from nemodiff.plugins.tensorrt.v3 import register_v3


def stages(api: Any, kernels: Any) -> None:
    """Register every stage as a plugin of its own, as the full TensorRT has them in quick plugins."""
    for op in OPS:
        for stage in op.stages:
            register_v3(api, stage_op(op, stage), None)


def only_attention(api: Any, kernels: Any) -> None:
    register_v3(api, OPS[0], None)


def nothing(api: Any, kernels: Any) -> None:
    pass


def abort(api: Any, kernels: Any) -> None:
    os.write(2, b"terminate called\n")
    os.abort()


def killed(api: Any, kernels: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(api: Any, kernels: Any) -> None:
    Path(os.environ["NEMODIFF_TEST_PID"]).write_text(str(os.getpid()))
    time.sleep(60)
