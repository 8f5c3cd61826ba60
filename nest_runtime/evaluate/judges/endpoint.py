"""Asking a third-party chat endpoint: which forms it takes, which errors pass, and when it withholds one answer.

Nothing here knows what is asked. An error about one question (filtered, too long, no answer in it) belongs to that
question. An error about all of them (no such model, a wrong key, a server that stays away) ends the asking.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nest_runtime.errors import EvaluationError
from nest_runtime.escape import visible
from nest_runtime.web import web_client

_RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_ABOUT_ONE = {400, 403, 413, 422}  # 403 only where the question was filtered
_FILTERED = ("content_filter", "content_policy", "content management policy", "moderation", "flagged", "responsible_ai")
_UNKNOWN = ("support", "instead", "unrecognized", "unknown", "not permitted", "extra")
_LIMITS = ("max_tokens", "max_completion_tokens", "")  # what the longest answer is called, here and there


class Withheld(Exception):
    """The endpoint gave no answer to this question; it may give others."""


class _Passing(Exception):
    """The endpoint may answer later. ``whole``: nothing else would be answered now either."""

    def __init__(self, reason: str, *, whole: bool) -> None:
        super().__init__(reason)
        self.whole = whole


@dataclass(frozen=True)
class _Form:
    """How a request is put: which of the output forms, what its length is called, whether it names a temperature."""

    layout: int = 0
    limit: int = 0
    temperature: bool = True


class Endpoint:
    """``POST {base_url}/chat/completions``; threads may share one.

    Args:
        model: the model's name there.
        base_url: the API's root.
        api_key: sent as a bearer token where given.
        layouts: values of ``response_format`` to try in turn, None for none; the first one that is taken is kept.
        timeout: seconds per request.
        max_tokens: of an answer.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str,
        layouts: Sequence[dict[str, Any] | None],
        *,
        timeout: float,
        max_tokens: int = 400,
    ) -> None:
        self.model, self.base_url, self._layouts, self._max_tokens = model, base_url, layouts, max_tokens
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = web_client(headers=headers, timeout=timeout)
        self._lock = threading.Lock()
        self._form = _Form()
        self.used = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def ask(self, messages: list[dict[str, str]], attempts: int) -> str:
        """The answer to one conversation, errors that pass tried again.

        Raises:
            Withheld: there is none to this one.
            EvaluationError: there will be none to any.
        """
        import httpx2
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

        retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=0.25, max=20) + wait_random(0, 0.25),
            retry=retry_if_exception_type((_Passing, httpx2.TransportError)),
            reraise=True,
        )
        try:
            return retrying(self._ask, messages)
        except (_Passing, httpx2.TransportError, httpx2.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, _Passing) and not error.whole:
                raise Withheld(reason) from error
            raise EvaluationError(
                f"the judge {self.model} at {self.base_url} cannot be reached: {reason} ({attempts} attempts)",
                "check the address and that the server runs; answers and verdicts so far are kept in the work folder",
            ) from error

    def _ask(self, messages: list[dict[str, str]]) -> str:
        form = self._form
        while True:
            response = self._client.post(f"{self.base_url}/chat/completions", json=self._body(messages, form))
            status, text = response.status_code, response.text[:2000]
            if status == 200:
                answer = self._read(response)
                with self._lock:
                    self._form = form
                return answer
            if status in _RETRY_STATUS:
                raise _Passing(f"HTTP {status}", whole=True)
            if status in _ABOUT_ONE and _is_filtered(text):
                raise Withheld(f"HTTP {status}: {visible(text, 200)}")
            other = self._otherwise(form, text) if status in (400, 422) else None
            if other is None and status in _ABOUT_ONE - {403}:
                raise Withheld(f"HTTP {status}: {visible(text, 200)}")
            if other is None:
                raise EvaluationError(
                    f"the judge {self.model} at {self.base_url} answered HTTP {status}: {visible(text.strip(), 200)}",
                    "check the model's name, the address (it usually ends in /v1) and $OPENAI_API_KEY",
                )
            form = other

    def _body(self, messages: list[dict[str, str]], form: _Form) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if form.temperature:
            body["temperature"] = 0
        if _LIMITS[form.limit]:
            body[_LIMITS[form.limit]] = self._max_tokens
        layout = self._layouts[form.layout]
        return body if layout is None else {**body, "response_format": layout}

    def _otherwise(self, form: _Form, text: str) -> _Form | None:
        """Another form for a request that was refused with these words, or None if all were tried."""
        if _refuses(_LIMITS[form.limit], text):
            return replace(form, limit=form.limit + 1)
        if form.temperature and _refuses("temperature", text):
            return replace(form, temperature=False)
        return replace(form, layout=form.layout + 1) if form.layout + 1 < len(self._layouts) else None

    def _read(self, response: Any) -> str:
        """The words of a 200, which may be an error all the same."""
        try:
            data = response.json()
            error, choices = data.get("error"), data.get("choices")
            usage = data.get("usage") or {}
            if error and not choices:
                text = visible(response.text, 200)
                if _is_filtered(response.text):
                    raise Withheld(text)
                raise _Passing(f"an error in an answer that says HTTP 200: {text}", whole=False)
            if choices == []:
                raise _Passing("an answer without choices", whole=False)
            choice = choices[0]
            content = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{self.base_url} answered no chat completion: {visible(response.text.strip(), 200)!r}",
                "give the address of an OpenAI-compatible API; it usually ends in /v1",
            ) from error
        with self._lock:
            self.used["requests"] += 1
            for key in ("prompt_tokens", "completion_tokens"):
                self.used[key] += int(usage.get(key) or 0)
        if not content and choice.get("finish_reason") == "content_filter":
            raise Withheld("finish_reason is content_filter")
        return content if isinstance(content, str) else ""


def _refuses(field: str, text: str) -> bool:
    """Whether an error says that a field is not known, and not just that a number in it does not fit."""
    if not field or field not in text:
        return False
    try:
        param = json.loads(text)["error"]["param"]
    except (ValueError, LookupError, TypeError):
        param = None
    return param == field if param else any(word in text.lower() for word in _UNKNOWN)


def _is_filtered(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in _FILTERED)
