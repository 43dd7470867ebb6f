"""The texts of single tokens, also of those that are only some bytes of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cache
from typing import Any

_UNKNOWN = "\ufffd"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Return the text of each token id, decoded separately. Bytes that are only part of a character are written as `<0xF0>`.

    An id that is none of the tokenizer's, as a placeholder may be (LLaVA's is -200), is written as `<-200>`.
    """
    wanted = list(ids)
    different = dict.fromkeys(wanted)  # long prompts repeat their ids, above all placeholders
    texts = dict(zip(different, _decoded(tokenizer, different), strict=True))
    return [texts[token] for token in wanted]


def _decoded(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    texts = []
    for token in ids:
        if not 0 <= token < 1 << 31:  # the tokenizer's own type for ids
            texts.append(f"<{token}>")
            continue
        text = tokenizer.decode([token])
        if _UNKNOWN in text:
            piece = tokenizer.convert_ids_to_tokens(token)
            raw = None if piece is None else _bytes_of(piece)
            if raw is not None:
                text = raw.decode("utf-8", _HEXADECIMAL)
        texts.append(text)
    return texts


def _bytes_of(piece: str) -> bytes | None:
    """The bytes of a vocabulary entry: of SentencePiece's byte tokens (`<0xF0>`) or of a byte-level vocabulary; None for others."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return None
    table = _byte_level()
    return bytes(table[letter] for letter in piece) if all(letter in table for letter in piece) else None


@cache
def _byte_level() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _hexadecimal(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


_HEXADECIMAL = "workbench-hexadecimal"
codecs.register_error(_HEXADECIMAL, _hexadecimal)
