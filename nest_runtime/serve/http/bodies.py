"""A request's body before anything reads it: complete, in time, of limited size, with a limited number of values.

Reading JSON costs by the value, not by the byte: four megabytes of ``{},`` are a million objects, and a million errors
if objects are not expected. The count is made on the bytes, at the speed of regular expressions, and ends at the
limit. It is right for UTF-8 alone, which JSON is sent in.
"""

from __future__ import annotations

import json
import re
from functools import cache

from nest_runtime.serve.http.problems import ApiError

MAX_NAMED = 16_384  # objects and lists in one body, and names in its objects: tools bring the most of them
MAX_DEPTH = 100  # lists and objects within each other: whatever reads them later goes down by calling itself

# A whole JSON string, or one that the body's end cuts off. Possessive throughout: no byte is looked at twice.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)'


# What comes before the next bracket outside of strings, and that bracket.
_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:%b[^"\[\]{}]*+)*+([\[\]{}])' % _STRING, re.DOTALL)


def check_body(body: bytes | bytearray, max_values: int) -> None:
    """Whether a body is one that a server reads. Raises ApiError 400; what is no JSON is not its business.

    Args:
        body: the bytes.
        max_values: in lists and objects together.
    """
    encoding = json.detect_encoding(body)
    if encoding not in ("utf-8", "utf-8-sig"):
        raise ApiError(400, f"The body is in {encoding}; expected JSON in UTF-8.", code="invalid_value")
    check_counts(body, max_values)
    check_depth(body)


def check_depth(body: bytes | bytearray, param: str | None = None) -> None:
    """Whether the lists and objects of a JSON text are not too deep within each other. Raises ApiError 400.

    Args:
        body: the text.
        param: the field that it came in, for the error.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth, scanner = 0, _BRACKET.scanner(body)  # type: ignore[attr-defined]  # the types do not know it
    while (found := scanner.match()) and depth >= 0:
        depth += 1 if found[1] in b"[{" else -1
        if depth > MAX_DEPTH:
            message = f"Lists and objects are more than {MAX_DEPTH} deep within each other; at most that many are read."
            raise ApiError(400, message, code="nested_too_deep", param=param)


def check_counts(body: bytes | bytearray, max_values: int) -> None:
    """Whether a JSON text holds no more values than a server reads. Raises ApiError 400.

    Args:
        body: the bytes.
        max_values: in lists and objects together.
    """
    for marks, most, what in (
        (b",", max_values, "values"),
        (b"[{", MAX_NAMED, "objects and lists"),
        (b":", MAX_NAMED, "names in objects"),
    ):
        seen = sum(body.count(bytes([mark])) for mark in marks)  # those in strings too: never fewer than there are
        if seen > most and _more_than(marks, most).match(body):
            message = f"The body holds more than {most} {what}; at most that many are taken."
            raise ApiError(400, message, code="too_many_values")


@cache
def _more_than(marks: bytes, most: int) -> re.Pattern[bytes]:
    """Matches a body with more than ``most`` of these marks outside of its strings."""
    other = b'[^"' + re.escape(marks) + b"]*+"
    one = b"(?:%b(?:%b%b)*+[%b])" % (other, _STRING, other, re.escape(marks))
    return re.compile(one + b"{%d}+" % (most + 1), re.DOTALL)
