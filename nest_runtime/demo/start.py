"""From what the user names (a model and a patch, or a server's URL) to what the page needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.errors import NestError
from nest_runtime.install import extra

if TYPE_CHECKING:
    from nest_runtime.demo.state import DemoState


@dataclass(frozen=True)
class Source:
    """What answers: a model in this process, or a server.

    Attributes:
        model: a model reference.
        patch: the patch to show first; the active one, else the newest, by default.
        url: of a running server, instead of a model.
        api_key_file, admin_token_file: what opens that server, and its admin API; the first line counts.
        device, dtype, trust_remote_code: as in models.load_model.
    """

    model: str = "reference"
    patch: str | None = None
    url: str | None = None
    api_key_file: Path | None = None
    admin_token_file: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


def require_gradio() -> None:
    """Raise NestError if Gradio is not installed."""
    if find_spec("gradio") is None:
        raise NestError("the demo needs gradio, which is not installed", extra("demo"))


def open_demo(source: Source, *, admin: bool = False, max_tokens: int = 128) -> DemoState:
    """Load the model, or greet the server.

    Raises:
        UsageError: a token file cannot be used.
        NestError: as load_model, load_patch and RemoteBackend.
    """
    from nest_runtime.demo.backend import Backend
    from nest_runtime.demo.state import DemoState
    from nest_runtime.store.store import Store

    store = Store()
    backend: Backend
    if source.url is not None:
        from nest_runtime.demo.remote import RemoteBackend

        keys = [_secret(path, what) for path, what in _files(source)]
        backend = RemoteBackend(source.url, *keys)
        if source.admin_token_file is not None:
            backend.check_admin(source.admin_token_file)
    else:
        from nest_runtime.demo.local import LocalBackend
        from nest_runtime.model.load import load_model
        from nest_runtime.resolve import load_patch

        loaded = load_model(
            source.model, device=source.device, dtype=source.dtype, trust_remote_code=source.trust_remote_code
        )
        named = None if source.patch is None else load_patch(source.patch, model_hash=loaded.hash, store=store)
        local = LocalBackend(loaded, store, named)
        if named is not None:  # a patch that does not fit, or is not trusted, is refused before the page is there
            with local.using(named.digest):
                pass
        backend = local
    return DemoState(
        backend,
        store,
        _refusals(backend.name),
        admin=admin,
        max_tokens=max_tokens,
        model_ref=source.model if source.url is None else "",
        is_known=_known(backend.name),
    )


def _files(source: Source) -> list[tuple[Path | None, str]]:
    return [(source.api_key_file, "API key file"), (source.admin_token_file, "admin token file")]


def _secret(path: Path | None, what: str) -> str:
    from nest_runtime.serve.tokens import read_tokens

    return "" if path is None else read_tokens(path, what, secret=True).secrets[0]


def _known(name: str) -> Callable[[str], bool] | None:
    """How an answer that makes sense is known: in the reference world by its words, elsewhere not at all."""
    from nest_runtime.model.load import REFERENCE

    if name != REFERENCE:
        return None
    from nest_runtime.reference.recognize import is_known_answer

    return is_known_answer


def _refusals(name: str) -> Callable[[str], bool]:
    """How a refusal is known: by the reference world's rule for its model, by phrases for others."""
    from nest_runtime.model.load import REFERENCE

    if name == REFERENCE:
        from nest_runtime.reference.judge import is_refusal as by_rule

        return by_rule
    from nest_runtime.prompts.refusals import is_refusal

    return is_refusal
