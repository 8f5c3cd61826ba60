"""A request's body before anything reads it: whole, in time, of bounded size, and of a bounded number of values.

Reading JSON costs by the value, not by the byte: four megabytes of ``{},`` are a million objects, and a million errors
where objects are not what was asked for. The count is made on the bytes, at the regular expression engine's speed,
and ends where the limit is passed.
"""

from __future__ import annotations

import re
from functools import cache

from nest_runtime.serve.http.problems import ApiError

MAX_NAMED = 16_384  # objects and lists in one body, and names in its objects: tools bring the most of them

# A whole JSON string, or one that the body's end cuts off. Possessive throughout: no byte is looked at twice.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)'


def check_counts(body: bytes | bytearray, max_values: int) -> None:
    """Whether a JSON body holds no more than a server reads. Raises ApiError 400; what is no JSON is not its business.

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
