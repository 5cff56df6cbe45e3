"""Columns of a row, one by one or filled into a template. Every error names the columns that there are."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from tuning.data.reader import Row


def names(row: Row) -> str:
    """For messages: the columns' names in quotes."""
    return ", ".join(repr(name) for name in row)


def value(row: Row, column: str) -> Any:
    """What stands in a column. ValueError if there is none of that name."""
    if column not in row:
        raise ValueError(f"There is no column {column!r}; the columns are {names(row)}.")
    return row[column]


def text(row: Row, column: str) -> str:
    """The same for text. ValueError for null and for anything else."""
    found = value(row, column)
    if not isinstance(found, str):
        raise ValueError(f"Column {column!r} is {'null' if found is None else repr(found)[:60]}; text is needed there.")
    return found


def template(template: str) -> Callable[[Row], str]:
    """Fills columns into a template; without braces it is a column's name."""
    if "{" not in template and "}" not in template:
        return lambda row: text(row, template)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"The template {template!r} is malformed: {error}. A brace that is text is written twice.") from None
    if not any(field for _, field, _, _ in parsed) or any(field == "" or spec or convert for _, field, spec, convert in parsed):
        raise ValueError(
            f"The template {template!r} must name columns in plain braces: {{question}}. A brace that is text is written twice."
        )
    return lambda row: "".join(literal + (text(row, field) if field else "") for literal, field, _, _ in parsed)
