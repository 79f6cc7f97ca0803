"""What is told of an error that a library raises."""

import pytest

from nemodiff.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n  one \ntwo"), "one"),
        (ValueError(), "ValueError"),
        (KeyError(" "), "' '"),
        (RuntimeError("\n \n"), "RuntimeError"),
    ],
)
def test_an_error_is_told_by_its_first_line_or_its_kind(error: Exception, told: str) -> None:
    assert first_line(error) == told
