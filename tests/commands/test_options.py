"""The table of options, and what is derived from it."""

import runpy
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import nemodiff
from nemodiff.cli import main
from nemodiff.commands.options import WITHOUT_FLAG, flag
from nemodiff.commands.run import run
from nemodiff.runtime.requests.options import OPTIONS

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/write-option-table"


def test_the_page_on_serving_has_the_options_as_they_are() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / SCRIPT))["rewritten"](page), f"docs/serving.md is old; run {SCRIPT}"


def test_choices_are_shown_as_everything_else_spells_them() -> None:
    told = CliRunner().invoke(main, ["build", "--help"])
    assert "fp8_dynamic]" in told.stdout
    assert "fp8-dynamic" not in told.stdout


def test_help_names_a_flag_only_where_it_is() -> None:
    for command in ("run", "batch", "chat", "eval"):
        told = CliRunner().invoke(main, [command, "--help"]).stdout
        assert ("needs --json" in " ".join(told.split())) == (command == "run")


def test_every_help_text_is_one_sentence() -> None:
    for option in OPTIONS.values():
        text = option.help.text
        assert text[0].isupper(), option.name
        assert text.endswith("."), option.name
        assert text.count(". ") == 0, option.name


def test_flags_have_the_defaults_of_the_options() -> None:
    context = run.make_context("run", ["engine", "-p", "x"])
    parameters = {one.name: one for one in run.get_params(context) if isinstance(one, click.Option)}
    values = context.params
    for name, option in OPTIONS.items():
        if name not in WITHOUT_FLAG:
            assert parameters[name].opts == [flag(name)]
            assert values[name] == option.default or not (values[name] or option.default)


@pytest.mark.parametrize("values", [{"top_p": 2.0}, {"mode": "fast"}, {"seed": True}, {"stop": [""]}, {"beams": 4}])
def test_wrong_values_are_refused_wherever_options_are_made(values: dict[str, object]) -> None:
    with pytest.raises(nemodiff.RequestError):
        nemodiff.Options(**values)  # type: ignore[arg-type]


def test_a_refusal_names_the_option_its_value_and_the_range() -> None:
    with pytest.raises(nemodiff.RequestError, match=r"^top_p is 2\.0, allowed: over 0 to 1$"):
        nemodiff.Options(top_p=2.0)
