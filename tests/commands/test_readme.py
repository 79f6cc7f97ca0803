"""Every command of the README runs, and the README's files are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files a clone would have, where the commands may write."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(command: list[str], folder: Path) -> str:
    path = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout + done.stderr


def test_shell_and_python_commands_run_in_order(clone: Path) -> None:
    commands = 0
    for language, block in BLOCKS:
        if language == "python":
            assert "x 5 = 35" in run([str(BIN / "python"), "-W", "error", "-c", block], clone)
            continue
        for line in block.splitlines():
            if not line.startswith("make "):
                run(["bash", "-euc", line], clone)
                commands += 1
    assert commands == 18


def test_make_targets_exist_and_the_demo_shows_three_modes(clone: Path) -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:  # -n: the recipes resolve; making the environment is what `make test` itself just did
        run(["make", "-n", target], clone)
    shown = run(["env", f"VENV={Path(sys.prefix)}", "scripts/demo"], clone)
    for mode in ("ar:", "diffusion:", "linear_spec:"):
        assert re.search(rf"^{mode} .* tokens per pass.* tokens/s$", shown, re.MULTILINE)
    assert shown.count("def add(a, b):") == 3


def test_links_lead_to_files() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_lifecycle_page_lists_every_file() -> None:
    page = (ROOT / "docs" / "lifecycle.md").read_text()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    missing = [n for n in listed if n.endswith(".py") and f"`{n}`" not in page]
    assert missing == []
