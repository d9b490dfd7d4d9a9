"""Times as rows have them: ISO dates, Chinese dates and timestamps, as microseconds since 1970 (UTC)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# 2024-3-5, 2024/3/5 8:30, 2024.3.5, 2024年3月5日 下午3时5分20秒, 2024年3月, 2024-03
_LOOSE = re.compile(
    r"(?P<year>\d{4})\s*[-/.年]\s*(?P<month>\d{1,2})\s*(?:[-/.月]\s*(?:(?P<day>\d{1,2})\s*[日号]?)?)?"
    r"(?:[\sT]*(?P<half>上午|下午|凌晨|早上|中午|晚上)?\s*(?P<hour>\d{1,2})\s*[:：时点]"
    r"\s*(?:(?P<minute>\d{1,2})\s*(?:[:：分]\s*(?:(?P<second>\d{1,2})(?:\.\d+)?\s*秒?)?)?)?)?"
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_MONTH = re.compile(r"\d{4}\.\d{1,2}")
_YEAR = re.compile(r"(\d{4})\s*年?")
_AMBIGUOUS = re.compile(r"\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}")


def reader_for(values: Iterable[Any]) -> Callable[[Any], float]:
    """What turns each value of a column into a number to order the rows by; it raises a ValueError as its reason.

    A column of numbers alone is ordered by them, be they years, dates (20240305) or steps, unless all are timestamps,
    which may be of several units. Any other column is read as times.
    """
    numbers = []
    for value in values:
        number = _as_number(value)
        if number is None:
            return microseconds
        numbers.append(abs(number))
    return microseconds if min(numbers, default=0) >= 1e8 else lambda value: _as_number(value) or 0.0


def _as_number(value: Any) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def microseconds(value: Any) -> int:
    """A time as microseconds since 1970; one without a zone is taken as UTC.

    Understood are what Python's ``datetime.fromisoformat`` reads, dates with ``/``, ``.`` or 年月日, a year, numbers
    of eight digits (20240305), and Unix timestamps in seconds, milliseconds, microseconds or nanoseconds.

    Raises:
        ValueError: it is none of these; says why.
    """
    if isinstance(value, datetime):
        return _since(value)
    if isinstance(value, date):
        return _since(datetime(value.year, value.month, value.day))
    if isinstance(value, bool) or value is None:
        raise ValueError("it is no time")
    number = _as_number(value)
    if number is not None and not (isinstance(value, str) and _MONTH.fullmatch(value.strip())):
        return _number(number)
    text = str(value).strip()
    try:
        return _since(datetime.fromisoformat(text))
    except ValueError:
        pass
    year = _YEAR.fullmatch(text)
    if year:
        return _since(datetime(int(year[1]), 1, 1))
    found = _LOOSE.fullmatch(text)
    if found:
        return _since(_from_parts(found))
    if _AMBIGUOUS.fullmatch(text):
        raise ValueError("which of its numbers is the day and which the month cannot be told")
    raise ValueError("it is no date of a known form")


def _from_parts(found: re.Match[str]) -> datetime:
    hour, half = int(found["hour"] or 0), found["half"]
    if hour < 12 and (half in ("下午", "晚上") or (half == "中午" and hour < 6)):
        hour += 12
    elif hour == 12 and half in ("上午", "凌晨"):
        hour = 0
    day = int(found["year"]), int(found["month"]), int(found["day"] or 1)
    return datetime(*day, hour, int(found["minute"] or 0), int(found["second"] or 0))


def _number(value: float) -> int:
    size = abs(value)
    if size == int(size):
        whole = int(value)
        if 1000 <= whole <= 9999:
            return _since(datetime(whole, 1, 1))
        if 1000_01_01 <= whole <= 9999_12_31:
            return _since(datetime(whole // 10_000, whole // 100 % 100, whole % 100))
    # A timestamp's unit shows in its size: 10¹¹ seconds are the year 5138, 10¹¹ milliseconds the year 1973.
    for limit, factor in ((1e11, 1_000_000), (1e14, 1_000), (1e17, 1)):
        if size < limit:
            return round(value * factor)
    return int(value) // 1_000


def _since(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // _MICROSECOND
