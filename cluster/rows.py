"""Rows of an answer on their way out: the same values whatever database they came from."""

from decimal import Decimal
from typing import Any


def plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """PostgreSQL's sums of integers come as decimals, SQLite's as integers: the answer is the same."""
    return tuple(_number(value) if isinstance(value, Decimal) else value for value in row)


def _number(value: Decimal) -> int | float:
    exponent = value.as_tuple().exponent
    return int(value) if isinstance(exponent, int) and exponent >= 0 else float(value)
