"""A running ``nest-runtime serve``, by its URL: the answers say which patch gave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nest_runtime.demo.backend import BASE, TOY, DemoAnswer, Message, OnAnswers, OnText, PatchChoice
from nest_runtime.errors import AdminApiOff, EngineError, NestError, TrustError, UsageError
from nest_runtime.escape import short
from nest_runtime.model.load import REFERENCE
from nest_runtime.serve.client import AdminClient
from nest_runtime.web import web_client

if TYPE_CHECKING:
    from pathlib import Path

    from nest_runtime.store.entries import Entry

TIMEOUT = 60.0  # seconds without a byte
ACTIVE = "the server's own"
AT_ONCE = 8  # requests in flight, of many that are to be answered
SHOWN = 120  # characters of what a server said that is none of ours
TOO_LONG = "context_length_exceeded"
HINTS = {
    400: "ask something else: the server does not take this request",
    401: "start the demo with --api-key-file and the server's key",
    404: "reload the page: what the server offers may have changed",
    422: "ask something else: the server does not take this request",
    429: "ask again in a while",
}


class RemoteBackend:
    """A server that speaks OpenAI's API and names its patches.

    Args:
        url: where it listens, with or without ``/v1``.
        api_key: for servers that ask for one.
        admin_token: for switching patches on servers whose admin API is on.

    Raises:
        EngineError: it cannot be reached, or is no such server.
    """

    def __init__(self, url: str, api_key: str = "", admin_token: str = "") -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        self.place = f"at {self.url}"
        self.model_hash: str | None = None
        self.can_switch = bool(admin_token)
        self._admin = AdminClient(self.url, admin_token)
        self._client = web_client(base_url=self.url, headers=headers, timeout=TIMEOUT)
        rows = self._models()
        if not rows:
            raise EngineError(f"{self.url} offers no models", "is it a nest-runtime server?")
        own = _own_row(rows)
        self.name = str(own["id"])
        self.about = TOY if self.name == REFERENCE else ""  # a server does not tell its model's size
        if "digest" in own:
            self.model_hash = self._served_hash()

    def choices(self) -> list[PatchChoice]:
        """The base where it is exposed, the active patch, and the other exposed ones."""
        rows = self._models()
        exposed = {str(row["id"]).partition("@")[2]: _digest(row) for row in rows if "@" in str(row["id"])}
        base = [PatchChoice(BASE)] if BASE in exposed else []
        others = [PatchChoice(label, digest) for label, digest in exposed.items() if label != BASE]
        return [*base, _own_choice(rows), *others]

    def preferred(self) -> PatchChoice | None:
        """Whatever the server has active; without its digest where the server does not answer."""
        with suppress(NestError):
            return _own_choice(self._models())
        return PatchChoice(ACTIVE)

    def answer(
        self,
        messages: Sequence[Message],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_text: OnText,
        stopped: Callable[[], bool],
    ) -> DemoAnswer:
        """One streamed chat completion. See Backend."""
        if choice.label == BASE and BASE not in {c.label for c in self.choices()}:
            raise EngineError("the server does not expose its base", "start it with --expose-base")
        model = self.name if choice.label == ACTIVE else f"{self.name}@{choice.label}"
        body = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        tokens, reason = 0, None
        with self._errors(), self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refused(response, several=len(messages) > 1)
            for event in _events(_lines(response.iter_bytes())):
                tokens = int((event.get("usage") or {}).get("completion_tokens", tokens))
                for part in event.get("choices") or []:
                    reason = part.get("finish_reason") or reason
                    if text := (part.get("delta") or {}).get("content"):
                        on_text(text)
                if stopped():
                    break
            label = response.headers.get("x-nest-patch", choice.label)
            digest = response.headers.get("x-nest-patch-digest", "")
        # the base's digest is "none"
        return DemoAnswer(label, digest if digest.startswith("sha256:") else None, tokens, reason == "length")

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_answers: OnAnswers,
    ) -> None:
        """Several requests at a time. See Backend."""

        def one(messages: Sequence[Message]) -> str:
            parts: list[str] = []
            self.answer(messages, choice, max_tokens=max_tokens, on_text=parts.append, stopped=lambda: False)
            return "".join(parts).strip()

        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures: dict[Future[str], int] = {pool.submit(one, item): n for n, item in enumerate(conversations)}
            try:
                for future in as_completed(futures):
                    on_answers([futures[future]], [future.result()])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def check_admin(self, file: Path) -> None:
        """Ask the admin API once. Raises UsageError where it is off, or the token from ``file`` does not open it."""
        try:
            self._admin.patches()
        except (UsageError, TrustError) as error:
            raise UsageError(
                f"{self.url} does not take the admin token of {file}",
                "give the file that the server was started with (its own --admin-token-file), or leave it out",
            ) from error
        except AdminApiOff as error:
            raise UsageError(
                f"{self.url} has no admin API", "start the server with --admin-token-file, or leave it out here"
            ) from error

    def active(self) -> str | None:
        """What the server says is active, where the admin token opens its admin API; else unknown."""
        return str(self._admin.patches().get("digest") or "") or None if self.can_switch else None

    def activate(self, entry: Entry) -> str:
        """Have the server load and activate a patch of its store."""
        return _switched(self._admin.activate(entry.digest))

    def rollback(self) -> str:
        """Have the server return to the patch before."""
        return _switched(self._admin.rollback())

    def _models(self) -> list[dict[str, Any]]:
        """The rows of ``/v1/models``, one for each name that clients may use."""
        with self._errors():
            response = self._client.get("/v1/models")
        if response.status_code != 200 and _said(response) is not None:
            raise _refused(response)
        try:
            rows = [dict(row) for row in response.json()["data"] if row["id"]]
        except (ValueError, KeyError, TypeError):
            rows = None
        if response.status_code != 200 or rows is None:
            raise EngineError(
                f"{self.url} is no nest-runtime server: /v1/models answered {response.status_code} "
                f"{_start(response)}; expected a list of models",
                "give the address that `nest-runtime serve` printed",
            )
        return rows

    def _served_hash(self) -> str | None:
        """The served model's hash, by the fingerprint of an answer of one token; None if there is none."""
        body = {"model": self.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        try:
            with self._errors():
                answer = self._client.post("/v1/chat/completions", json=body).json()
            parts = str(answer["system_fingerprint"]).split(";")  # model=sha256:…;patch=sha256:…
        except (NestError, ValueError, KeyError, TypeError):
            return None
        return next((part.removeprefix("model=") for part in parts if part.startswith("model=")), None)

    def _errors(self) -> Any:
        return _Errors(self.url)


class _Errors:
    """Turns what the HTTP client raises into our own error."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import httpx2

        if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
            raise EngineError(
                f"{self.url} cannot be reached: {error or type(error).__name__}",
                "is the server running? start it with `nest-runtime serve`",
            ) from error


def _switched(answer: dict[str, Any]) -> str:
    return f"active on the server: {answer.get('active')} ({short(str(answer.get('digest')))})"


def _own_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the model's bare name, under which the active patch answers."""
    return next((row for row in rows if "@" not in str(row["id"])), rows[0])


def _own_choice(rows: Sequence[Mapping[str, Any]]) -> PatchChoice:
    """The active patch, by its digest and by what the server calls it."""
    own = _own_row(rows) if rows else {}
    return PatchChoice(ACTIVE, _digest(own), str(own.get("patch") or ""))


def _digest(row: Mapping[str, Any]) -> str | None:
    """The digest of a row's patch; the base's is "none"."""
    digest = str(row.get("digest") or "")
    return digest if digest.startswith("sha256:") else None


def _said(response: Any) -> tuple[str, str] | None:
    """Message and code of an error as OpenAI's API writes it; None for any other answer."""
    try:
        said = response.json()["error"]
        return str(said["message"]), str(said.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _start(response: Any) -> str:
    """The first words of an answer's text, on one line."""
    words = " ".join(str(response.text).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def _refused(response: Any, *, several: bool = False) -> NestError:
    """The server's own words, and what to do about them; ``several`` if earlier turns were sent as well."""
    status = response.status_code
    message, code = _said(response) or (_start(response), "")
    if code == TOO_LONG or status == 413:
        hint = "ask something shorter, or begin a new conversation" if several else "ask something shorter"
    else:
        hint = HINTS.get(status, "see the server's log")
    return EngineError(f"the server answered {status}: {message}", hint)


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Lines as server-sent events have them: ended by LF, CR or both, and by none of Unicode's other ends."""
    left = b""
    for piece in pieces:
        *whole, left = (left + piece).split(b"\n")
        for line in whole:
            yield from line.removesuffix(b"\r").decode(errors="replace").split("\r")
    if left:
        yield from left.decode(errors="replace").split("\r")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON values of a stream of server-sent events. Raises EngineError for an error among them."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            said = event["error"]
            raise EngineError(str(said.get("message", said)), "ask again")
        yield event
