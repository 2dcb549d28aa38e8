"""Error messages as one short line of plain characters, whatever names from files are in them."""

from __future__ import annotations

import unicodedata

LONGEST = 500
_CUT = " ... "
# A terminal obeys them (Cc), or they hide or turn round what stands beside them (Cf, Zl, Zp), or they can't be written
# at all (Cs, Co, Cn).
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def one_line(message: str, longest: int = LONGEST) -> str:
    """`message` in one line of at most `longest` characters: control characters as escapes, the middle left out."""
    if len(message) > 4 * longest:  # before the work on each character
        message = message[: 2 * longest] + _CUT + message[-2 * longest :]
    line = "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _ESCAPED else character
        for character in " ".join(message.split())
    )
    if len(line) <= longest:
        return line
    end = (longest - len(_CUT)) // 2
    return line[: longest - len(_CUT) - end] + _CUT + line[-end:]
