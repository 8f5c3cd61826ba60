"""What a body must be before its fields are read: JSON by its content type, in valid text.

JSON can spell half of a surrogate pair, which is no character: nothing can encode it, not even an error that quotes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from nest_runtime.serve.http.problems import ApiError

# Half a pair can be in a body with such an escape, such bytes, or (UTF-16 and UTF-32) a zero byte: in few bodies.
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\0")


class JsonRoute(APIRoute):
    """A route whose body, if there is one, is JSON and says so. Raises ApiError 400 else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, for requests whose bodies have been looked at."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            """Refuse a body that is no JSON, before it is parsed."""
            if body := await request.body():
                kind = request.headers.get("content-type", "")
                if not is_json(kind):
                    raise wrong_type(kind)
                if _SUSPECT.search(body):
                    await _check(request)
            return await handle(request)

        return checked


async def _check(request: Request) -> None:
    try:
        value = await request.json()  # kept by the request: nothing parses it again
    except (ValueError, RecursionError):
        return  # what is no JSON the handler refuses itself
    check_text(value)


def is_json(content_type: str) -> bool:
    """Whether a content type says JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def wrong_type(content_type: str) -> ApiError:
    """400 for a body of another type: a web page can have browsers send those to any server, and JSON it cannot."""
    message = (
        f"The body's content type is {content_type or 'not given'}; expected application/json "
        "(with curl: -H 'content-type: application/json')."
    )
    return ApiError(400, message, code="invalid_content_type")


def check_text(value: Any) -> None:
    """Raises ApiError 400 where a text of a JSON value, or a field's name, holds half of a surrogate pair."""
    for path, text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise ApiError(
                400,
                f"{path or 'The body'}: {half} at character {error.start} is half a surrogate pair, and no character",
                code="invalid_value",
                param=path or None,
            ) from None


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every text, with the path of its field; iterative, since bodies may be nested deeply."""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, item = left.pop()
        if isinstance(item, str):
            yield path, item
        elif isinstance(item, dict):
            for key, child in item.items():
                yield path, key
                left.append((f"{path}.{key}" if path else key, child))
        elif isinstance(item, list):
            left += [(f"{path}.{index}" if path else str(index), child) for index, child in enumerate(item)]
