"""The linter reads every file of the product: a pattern that leaves a folder out may leave out another of its name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_linter_leaves_no_file_out() -> None:
    def told(*command: str) -> set[Path]:
        lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
        return {(ROOT / line).resolve() for line in lines.splitlines()}

    tracked = told("git", "ls-files", "*.py")
    assert tracked <= told(sys.executable, "-m", "ruff", "check", "--show-files", ".")
