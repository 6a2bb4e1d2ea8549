from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast.config import InputError
from cxgrad_fast.printable import LONGEST_LINE, one_line, shown


@examples(200)
@given(st.text(st.characters(), max_size=3000) | st.text(st.characters(categories=["Cs", "Cc", "Zl"]), max_size=50))
def test_any_text_is_one_printable_line(text: str) -> None:
    for line in (one_line(text), str(InputError(text)), shown(text)):
        assert line.isprintable()
        line.encode()
        assert len(line) <= LONGEST_LINE


def test_what_a_line_looks_like() -> None:
    assert one_line("two\nlines\r\n") == "two lines"
    assert one_line("\x1b[31mred\x07 \udcff \u202e ü 文") == r"\x1b[31mred\x07 \udcff \u202e ü 文"
    long = one_line("begin" + "x" * 5000 + "end", 100)
    assert len(long) == 100
    assert long.startswith("beginx")
    assert "..." in long
    assert long.endswith("xend")


def test_values() -> None:
    assert shown("five") == "'five'"
    assert shown("a\nb\x1b") == r"'a\nb\x1b'"
    assert shown(0.5) == "0.5"
    assert shown(10**5000) == "a number of 16610 bits"
    assert shown([1, [2, [3, [4]]]]) == "[1, [2, [3, [...]]]]"
    assert len(shown("x" * 5000)) < 90
    assert len(shown([["y" * 100] * 100] * 100)) <= 200
    assert shown(torch.zeros(2)) == "tensor([0., 0.])"


def test_what_has_no_end_and_what_cannot_be_printed() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(Unprintable()).startswith("<Unprintable instance at")
    nested: list[object] = []
    nested.append(nested)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(nested) == shown(deep) == "[[[[...]]]]"
