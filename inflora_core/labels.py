"""What a class may be called. Labels are compared as strings, so look-alikes are refused here."""

from __future__ import annotations

import unicodedata

from inflora_core.errors import InvalidInputError
from inflora_core.model import MARK

MAX_CHARACTERS = 200
"""Longest label, in Unicode code points."""

_JOINERS = "\u200c\u200d"
"""Invisible, but Persian words and composed emoji are misspelt without them."""


def check_label(label: str, *, field: str) -> str:
    """Return ``label`` unchanged if it may name a class.

    A label is 1 to 200 printable characters in Unicode NFC without white space at either end.
    Nothing is corrected silently: the caller would look for a class by the name it sent.

    Args:
        label: The class name as it arrived.
        field: The request field it came in, as a path (``examples[3].label``).

    Raises:
        InvalidInputError: saying what is wrong; the message quotes the label in ASCII, because a
            message that holds an unpaired surrogate could not be sent.
    """
    fault = _fault(label)
    if fault:
        raise InvalidInputError(f"label {_quoted(label)} {fault}", field=field)
    return label


def _fault(label: str) -> str:
    """Return what is wrong with ``label``, or ""."""
    if not label:
        return "is empty; name the class"
    if len(label) > MAX_CHARACTERS:
        return f"has {len(label)} characters; at most {MAX_CHARACTERS} are allowed"
    surrogate = next((c for c in label if unicodedata.category(c) == "Cs"), None)
    if surrogate is not None:
        return "holds an unpaired surrogate; it is not Unicode text"
    if label == MARK:
        return "stands for the names of classes that are forgotten; choose another"
    if label != label.strip():
        return "starts or ends with white space; strip it"
    if not unicodedata.is_normalized("NFC", label):
        # "é" as one code point and as "e" plus an accent look the same and compare different:
        # without this, one class would be learned as two.
        return (
            "is not in Unicode NFC; normalise it, in Python with "
            "unicodedata.normalize('NFC', label)"
        )
    hidden = next((c for c in label if not c.isprintable() and c not in _JOINERS), None)
    if hidden is None and (label[0] in _JOINERS or label[-1] in _JOINERS):
        hidden = label[0] if label[0] in _JOINERS else label[-1]
    if hidden is not None:
        return f"holds U+{ord(hidden):04X}, a control or invisible character; remove it"
    return ""


def _quoted(label: str) -> str:
    """Return ``label`` in ASCII with escapes, shortened to what a message can carry."""
    return ascii(label if len(label) <= 60 else label[:60] + "...")
