"""What a cell of a prompt file means: text, a value of JSON, or nothing.

All readers yield Python values of cells; here they get one meaning, whatever the file's format.
"""

import datetime
import math
import re
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pyarrow as pa

from mpd_data.common.errors import DataError

_NOT_UNICODE = "holds bytes that are not UTF-8, or half a character"
_TO_UTF8 = (
    ". Save the file as UTF-8. If it is Windows-1252 or Latin-1 (a guess): iconv -f WINDOWS-1252"
    " -t UTF-8 OLD > NEW"
)
_WHOLE = ". Write the character whole, or leave it out"
CUT_SHORT = ". The line ends inside an object or a text: was it cut short? Write it again"
# What messages add to a flaw. It is no part of the ids that are made of flaws, so that rounds of
# older versions resume.
_HINTS = (_TO_UTF8, _WHOLE, CUT_SHORT)
# Spellings of a missing value that tables export, in lower case. Not "none", "na" or "-": these are
# also answers (the none of a multiple choice, sodium, a sign).
_MISSING = frozenset(("", "n/a", "#n/a", "<na>", "nan", "null", "\\n"))


def is_missing(value: Any) -> bool:
    """Return whether a cell holds nothing: null, NaN, an empty list, blank text, or one of the
    texts N/A, #N/A, <NA>, NaN, null and \\N in any case."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, list | tuple) and not value)


def as_text(value: Any, column: str, option: str, scalars: bool = False) -> str | None:
    """Return a cell's text, None for a missing one. With `scalars` also the text of a number
    (exact), a truth value (true, false), a date or time (ISO 8601), a UUID, and of a list of one of
    these. Raise DataError for the rest, such as infinity; its text begins with the column."""
    if is_missing(value):
        return None
    name = f"column {column!r}"
    if isinstance(value, float | Decimal) and math.isinf(value):
        raise DataError(f"{name} holds {value}, expected a number below 1e308. Write it as text.")
    if scalars and isinstance(value, list | tuple):
        if len(value) > 1:
            raise DataError(
                f"{name} holds a list of {len(value)} values. Whether one of them or all are meant"
                " is not known: write one text into each row."
            )
        return as_text(value[0], column, option, scalars)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    elif scalars:
        value = _scalar_text(value)
    if not isinstance(value, str):
        raise DataError(
            f"{name} holds {type(value).__name__}, expected text{' or a number' * scalars}. Name"
            f" the column that holds it with {option}."
        )
    if not is_unicode(value):
        raise DataError(f"{name} {not_unicode(value)}.")
    return value


def _scalar_text(value: Any) -> Any:
    """Return the text of a scalar, other values as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, int | float | uuid.UUID | datetime.timedelta):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value


def as_json(value: Any, where: str) -> Any:
    """Return `value` in JSON types: None for NaN, text for what JSON lacks (dates, decimals). Raise
    DataError, which begins with `where`, for bytes and text that are not UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} holds bytes, not text. Leave the column out.") from error
    if isinstance(value, float | Decimal) and math.isnan(value):
        return None
    if isinstance(value, int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {as_json(str(k), where): as_json(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v, where) for v in value]
    text = _scalar_text(value)
    if not isinstance(text, str):
        # Such as a picture that `datasets` has decoded.
        raise DataError(f"{where} holds {type(value).__name__}, not text. Leave the column out.")
    if not is_unicode(text):
        raise DataError(f"{where} {not_unicode(text)}.")
    return text


def written(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata as rows hold it, with None for texts that mean a missing value. (A round's
    identity holds the texts, so that rounds of older versions resume.)"""
    return {
        name: None if isinstance(value, str) and is_missing(value) else value
        for name, value in metadata.items()
    }


def is_unicode(text: str) -> bool:
    """Return False for text with lone surrogates, which JSON can hold and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def not_unicode(text: str) -> str:
    """Return what is wrong with `text`, which is not Unicode, and the remedy, to follow a name."""
    # Readers keep bytes that are not UTF-8 as these.
    return _NOT_UNICODE + (_TO_UTF8 if re.search("[\udc80-\udcff]", text) else _WHOLE)


def without_hint(flaw: str) -> str:
    """Return a flaw without what messages add to it."""
    return next((flaw.removesuffix(hint) for hint in _HINTS if flaw.endswith(hint)), flaw)


def short_floats(column: pa.Array) -> list[float | None]:
    """Return a column of 16- or 32-bit floats as the shortest decimals that mean them: 0.1, where
    the same value in 64 bits is 0.10000000149."""
    kind = column.type.to_pandas_dtype()
    return [None if cell is None else float(str(kind(cell))) for cell in column.to_pylist()]
