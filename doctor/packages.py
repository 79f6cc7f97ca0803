"""Python and the packages, against what nemodiff itself declares for each of its extras."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ..errors import install
from .check import Check, State, judged

_ROOT = Path(__file__).parents[1]
DEVELOPMENT = ("test", "dev")  # extras that running needs none of


def declared() -> tuple[str, dict[str, list[Requirement]]]:
    """The Pythons that nemodiff is for, and its packages by extra; those that it always needs are extra ''.

    A checkout says it in pyproject.toml, an installation in its metadata.
    """
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        extras = {"": values["dependencies"], **values["optional-dependencies"]}
        return values["requires-python"], {name: _needed_here(texts) for name, texts in extras.items()}
    metadata = importlib.metadata.metadata("nemodiff")
    found: dict[str, list[Requirement]] = {"": []}
    for text in importlib.metadata.requires("nemodiff") or ():
        requirement = Requirement(text)
        for name in metadata.get_all("Provides-Extra") or ():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name}):
                found.setdefault(name, []).append(requirement)
        if requirement.marker is None:
            found[""].append(requirement)
    return metadata["Requires-Python"], found


def python_check(wanted: str) -> Check:
    """The interpreter."""
    here = platform.python_version()
    fits = SpecifierSet(wanted).contains(here, prereleases=True)
    return judged("Python", fits, f"{here} ({sys.executable})", f"make an environment with Python {wanted}")


def package_checks(extras: dict[str, list[Requirement]]) -> list[Check]:
    """A line per extra where all is well, and one per package that is not."""
    checks = []
    for extra, requirements in extras.items():
        if extra in DEVELOPMENT or not requirements:  # the latter where markers leave it nothing on this system
            continue
        name = f"extra {extra}" if extra else "packages"
        ours, local = (f"nemodiff[{extra}]", f".[{extra}]") if extra else ("nemodiff", ".")
        versions = {one.name: version(one.name) for one in requirements}
        absent = [one.name for one in requirements if versions[one.name] is None]
        for one in requirements:
            here = versions[one.name]
            if here is not None and not one.specifier.contains(here, prereleases=True):
                checks.append(Check(name, "wrong", f"{one.name} {here}, needed: {one.specifier}", install(str(one))))
        if absent:
            state: State = "missing" if extra else "wrong"
            checks.append(
                Check(name, state, f"without {', '.join(absent)}", f"{install(ours)} (in a checkout: {install(local)})")
            )
        elif not any(check.name == name for check in checks):
            checks.append(Check(name, "ok", ", ".join(f"{name} {here}" for name, here in versions.items())))
    return checks


def _needed_here(texts: list[str]) -> list[Requirement]:
    """The requirements whose marker, if they have one, names this machine."""
    requirements = map(Requirement, texts)
    return [one for one in requirements if one.marker is None or one.marker.evaluate()]


def version(name: str) -> str | None:
    """Of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
