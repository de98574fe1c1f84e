"""Bytes to text: UTF-8, or what a byte-order mark says; anything else is refused with a way out."""

from __future__ import annotations

import codecs

from engine.data.errors import EncodingError

_MARKS: tuple[tuple[bytes, str], ...] = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The UTF-16 mark is the beginning of the UTF-32 one, so the longer is tried first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(name: str, raw: bytes) -> tuple[str, str]:
    """The text and the name of its encoding.

    Raises:
        EncodingError: naming the first bad byte (counted from 0) and its line, and a likely true encoding.
    """
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8")
    if encoding in ("utf-8", "utf-8-sig"):
        _refuse_nulls(name, raw)
    try:
        return raw.decode(encoding), encoding
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        bad = raw[error.start : error.start + 1].hex()
        label = encoding.removesuffix("-sig").upper()
        raise EncodingError(
            f"{name} is not valid {label}: byte {error.start:,} (0x{bad}), in line {line:,}.",
            _hint(raw, encoding),
        ) from error


def _refuse_nulls(name: str, raw: bytes) -> None:
    """Text with many null bytes is UTF-16 without its mark, or no text; a stray one is taken out later."""
    sample = raw[:65536]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if even + odd <= max(2, len(sample) // 100):
        return
    if max(even, odd) > len(sample) // 8 and min(even, odd) <= max(even, odd) // 8:
        raise EncodingError(
            f"{name} looks like UTF-16 without a byte-order mark ({even + odd:,} null bytes at its beginning).",
            "Save it as UTF-8 and try again.",
        )
    raise EncodingError(
        f"{name} is not text ({even + odd:,} null bytes at its beginning).", "Give a text file saved as UTF-8."
    )


def _hint(raw: bytes, encoding: str) -> str:
    """What the bytes probably are. Korean is tried first: nearly any bytes pass as cp1252."""
    if encoding == "utf-8":
        for guess, label in (("cp949", "Korean Windows"), ("cp1252", "Western Windows")):
            try:
                text = raw.decode(guess)
            except UnicodeDecodeError:
                continue
            other = [char for char in text[:200_000] if not char.isascii()]
            hangul = sum("가" <= char <= "힣" for char in other)
            if guess == "cp1252" or hangul * 2 > len(other):
                return f"It reads as {guess} ({label}): open it so, save it as UTF-8, and try again."
    return "The file may be damaged, or cut off; save it as UTF-8 and try again."
