"""Text from outside, made fit for one line of a message: no control characters, no escape sequences, not too long."""

from __future__ import annotations

import reprlib

LONGEST_LINE = 1000  # of a message: two long paths fit


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """``text`` as one printable line: line breaks become spaces, other control characters are written as escapes.

    Longer text keeps its beginning and its end.
    """
    line = " ".join(text.splitlines())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    if len(line) <= longest:
        return line
    head = 2 * longest // 3
    return f"{line[:head]}...{line[3 + head - longest :]}"


def shown(value: object) -> str:
    """``value`` as a message shows it, at most about a hundred characters: text in quotes, the rest as Python does.

    Works for anything: nested without end, numbers too long to print, objects that cannot be printed.
    """
    return one_line(_SHORT.repr(value), 200)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # from 4,300 digits on Python refuses to print it
            return f"a number of {x.bit_length()} bits"
        return super().repr_int(x, level)


_SHORT = _Short()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 6
