"""Text of tokens and names as it can be drawn safely: invisible characters as escapes, and none that reorders a line."""

from __future__ import annotations

import unicodedata
from functools import cache

from matplotlib import font_manager

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of control, format (zero-width, bidirectional), surrogate, private, unassigned and separator characters."""
_SPACES = " \n\t"
_WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
MONOSPACE = "DejaVu Sans Mono"  # matplotlib brings it along


def escaped(text: str) -> str:
    """Write control, zero-width, bidirectional and unassigned characters, and blanks other than a space, as `<U+202E>`.

    Line breaks and tabs stay. A combining mark at the beginning is put on a dotted circle.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(_escape(letter) if _is_hidden(letter) else letter for letter in text)
    return "◌" + shown if shown and unicodedata.combining(shown[0]) else shown


def label(text: str, length: int = 14) -> str:
    """A token as a short label: `escaped`, line breaks and tabs as arrows, a leading space as a dot, an empty token as ∅.

    Longer labels than `length` end with an ellipsis.
    """
    text = escaped(text).replace("\n", "↵").replace("\t", "⇥")
    text = "·" + text[1:] if text.startswith(" ") else text
    return (text if len(text) <= length else text[: length - 1] + "…") or "∅"


def without_math(text: str) -> str:
    """Escape `$`, between two of which matplotlib would read a formula."""
    return text.replace("$", r"\$")


def drawable(text: str) -> str:
    """`text` for a figure: characters that no font of `fonts` has are written as `<U+4E2D>`; `$` is escaped."""
    if text.isascii():
        return without_math(text)
    known = _known_characters()
    return without_math("".join(letter if ord(letter) in known else _escape(letter) for letter in text))


def width(text: str) -> int:
    """Columns of a monospace font that a text takes: 2 for each East Asian wide character, 0 for each combining mark."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


@cache
def fonts() -> tuple[str, ...]:
    """Families for tokens: a monospace font, then installed ones that have Chinese, Japanese and Korean characters."""
    installed = set(font_manager.get_font_names())
    return (MONOSPACE, *(name for name in _WIDE_FONTS if name in installed))


@cache
def _known_characters() -> frozenset[int]:
    known: set[int] = set()
    for name in fonts():
        known |= set(font_manager.get_font(font_manager.findfont(name)).get_charmap())
    return frozenset(known)


def _is_hidden(letter: str) -> bool:
    return letter not in _SPACES and (
        unicodedata.category(letter) in _HIDDEN
        or (letter.isspace() and letter != " ")
        or letter in "\u115f\u1160\u3164\uffa0\u2800"
    )


def _escape(letter: str) -> str:
    return f"<U+{ord(letter):04X}>"
