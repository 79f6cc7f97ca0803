"""What is told of an error that a library raises, and of a value that is wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemodiff.errors import excerpt, first_line, install


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_characters="'")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("ab\n\ud800\u4f60"), inner),
)


@given(JSON)
def test_a_value_is_quoted_as_python_writes_it(value: Any) -> None:
    assert excerpt(value) == f"{value!r:.60}"


class Counted(list[Any]):
    """A list that is read value by value, and never written as a whole."""

    read = 0

    def __iter__(self) -> Any:
        for one in super().__iter__():
            self.read += 1
            yield one

    def __repr__(self) -> str:
        raise AssertionError


def test_no_more_of_a_value_is_written_than_is_quoted() -> None:
    for one in (1, [], "", {}):
        value = Counted([one] * 1000)
        assert excerpt(value) == f"{[one] * 1000!r:.60}"
        assert value.read <= 60
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert excerpt(deep) == "[" * 60
    assert excerpt({"a": deep}) == "{'a': " + "[" * 54
    assert excerpt("x" * 10**6) == "'" + "x" * 59
    value = Counted([1])
    assert excerpt({"x" * 100: value}) == "{'" + "x" * 58
    assert value.read <= 1


def test_a_requirement_is_quoted_as_every_shell_takes_it() -> None:
    assert install("tensorrt-cu13", "--force-reinstall") == "pip install --force-reinstall tensorrt-cu13"
    assert install("nemodiff[trt]") == 'pip install "nemodiff[trt]"'
    assert install("numpy<1") == 'pip install "numpy<1"'
