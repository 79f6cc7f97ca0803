"""Every command of the README runs, and the README's files are there."""

import os
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
CODE = (".py", ".js", ".html")


def tracked() -> list[Path]:
    """The files a clone would have, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [Path(name) for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of those files where the commands may write."""
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def run(command: list[str], folder: Path) -> str:
    env = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    env |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}  # of conftest.py
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.long
def test_shell_and_python_commands_run_in_order(clone: Path) -> None:
    commands = 0
    for language, block in BLOCKS:
        if language == "python":
            assert "x 5 = 35" in run([str(BIN / "python"), "-W", "error", "-c", block], clone)
            continue
        for line in block.splitlines():
            if not line.startswith("make "):
                shown = run(["bash", "-euc", line], clone)
                commands += 1
                if "--tools" in line:
                    assert '{"city": "Oslo"}' in shown
    assert commands > 15


def test_make_targets_exist_and_the_demo_shows_three_modes(clone: Path) -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:  # -n: the recipes resolve; making the environment is what `make test` itself just did
        run(["make", "-n", target], clone)
    shown = run(["env", f"VENV={Path(sys.prefix)}", "scripts/demo"], clone)
    for mode in ("ar:", "diffusion:", "linear_spec:"):
        assert re.search(
            rf"^{mode} .* tokens per pass.* tokens/s; [0-9,]+ bytes of K/V per token$", shown, re.MULTILINE
        )
    assert shown.count("def add(a, b):") == 3


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_their_headings() -> None:
    links = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/*.md")]:
        for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                links += 1
                assert heading in anchors(file), f"{page.name}: {target}#{heading}"
    assert links > 10


def test_lifecycle_page_has_a_line_for_every_room() -> None:
    page = (ROOT / "docs" / "lifecycle.md").read_text()
    rooms = {f"{file.parent.as_posix()}/" for file in tracked() if file.suffix in CODE}
    lines = set(re.findall(r"^\| `([^`]+/)` \|", page, re.MULTILINE))
    assert rooms - lines == set(), "rooms without a line"
    assert {line for line in lines if not (ROOT / line).is_dir()} == set(), "lines without a room"
