"""Makes error messages one short line of plain characters, whatever names out of files they quote."""

from __future__ import annotations

import unicodedata

LONGEST = 500
_CUT = " ... "
# Unicode categories of characters that are written as escapes. A terminal obeys Cc. Cf, Zl and Zp can hide what stands
# beside them or turn it round. Cs can't be encoded, and Co and Cn have no look of their own.
_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def one_line(message: str, longest: int = LONGEST) -> str:
    """Return `message` as one line of at most `longest` characters.

    Control characters become escapes. The middle of a message that is too long is left out.
    """
    if len(message) > 4 * longest:  # shortened first, for the work below takes its time for each character
        message = message[: 2 * longest] + _CUT + message[-2 * longest :]
    line = "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in _ESCAPED else character
        for character in " ".join(message.split())
    )
    if len(line) <= longest:
        return line
    end = (longest - len(_CUT)) // 2
    return line[: longest - len(_CUT) - end] + _CUT + line[-end:]
