"""A model in this process: patches are loaded when first asked for, and every answer is pinned to one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nest_runtime.demo.backend import BASE, TOY, DemoAnswer, Message, OnAnswers, OnText, PatchChoice, size_in_words
from nest_runtime.errors import UsageError
from nest_runtime.escape import short
from nest_runtime.model.load import REFERENCE

if TYPE_CHECKING:
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.entries import Entry
    from nest_runtime.store.store import Store


WHY = "from the demo"
BATCH = 16  # answers between two looks at how far it is
UNLIMITED = 1 << 30  # tokens, for models that state no limit


class LocalBackend:
    """A loaded model and the store's patches for it.

    Args:
        loaded: the model and its tokenizer; nothing is patched yet.
        store: where its patches are.
        first: the patch to show first; the active one, else the newest, by default.
    """

    def __init__(self, loaded: LoadedModel, store: Store, first: Patch | None = None) -> None:
        from nest_runtime.runtime import PatchRuntime
        from nest_runtime.runtime.passes import PassLock
        from nest_runtime.trust.guard import guard_for

        self.loaded, self.store = loaded, store
        self.name = loaded.name
        self.model_hash: str | None = loaded.hash
        self.about = size_in_words(sum(weights.numel() for weights in loaded.model.parameters()))
        if self.name == REFERENCE:
            self.about += f", {TOY}"
        self.place = f"in this process, on {loaded.device}"
        self.can_switch = True
        self.runtime = PatchRuntime(loaded.model, base_hash=loaded.hash)
        self._guard = guard_for(store)
        self._passes = PassLock()
        self._keys: dict[str, str] = {}  # digest → key in the runtime
        self._lock = threading.Lock()
        self._own = {first.digest: first} if first is not None else {}

    def entries(self) -> list[Entry]:
        """The store's patches for the model, and the one that was named, by name and serial."""
        from nest_runtime.patch.write import to_bytes
        from nest_runtime.store.entries import entry_of

        entries = self.store.list(self.loaded.hash)
        known = {entry.digest for entry in entries}
        entries += [entry_of(patch, len(to_bytes(patch))) for digest, patch in self._own.items() if digest not in known]
        return sorted(entries, key=lambda entry: (entry.name, entry.serial, entry.version))

    def choices(self) -> list[PatchChoice]:
        """The base, the store's patches for the model, and the one that was named, by serial."""
        entries = self.entries()
        versions = [entry.version for entry in entries]
        named = [
            PatchChoice(e.version if versions.count(e.version) == 1 else f"{e.name}@{e.version}", e.digest)
            for e in entries
        ]
        return [PatchChoice(BASE), *named]

    def preferred(self) -> PatchChoice | None:
        """The named patch, else the active one, else the newest."""
        choices = self.choices()[1:]
        entries = self.store.list(self.loaded.hash)
        active = next((e.digest for e in entries if e.active), None)
        newest = max(entries, key=lambda e: e.serial, default=None)
        wanted = next(iter(self._own), None) or active or (newest.digest if newest else None)
        return next((choice for choice in choices if choice.digest == wanted), None)

    def patch(self, digest: str) -> Patch:
        """A patch by its digest. Raises what ``Store.get`` raises."""
        return self._own.get(digest) or self.store.get(digest)

    def answer(
        self,
        messages: Sequence[Message],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_text: OnText,
        stopped: Callable[[], bool],
    ) -> DemoAnswer:
        """Greedy decoding under one patch from the first token to the last. See Backend."""
        from nest_runtime.prompts.chat import answer_chat

        self.room(messages, begun=True)
        with self.using(choice.digest):
            made = answer_chat(
                self.loaded.model,
                self.loaded.tokenizer,
                messages,
                max_tokens=max_tokens,
                on_text=on_text,
                stopped=stopped,
            )
        return DemoAnswer(choice.label, choice.digest, made.tokens, made.cut)

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_answers: OnAnswers,
    ) -> None:
        """Greedy answers in padded batches, none beyond what the model reads. See Backend."""
        from nest_runtime.prompts.generate import generate_answers

        limits = [min(max_tokens, self.room(messages)) for messages in conversations]  # before anything is answered
        for limit in sorted(set(limits), reverse=True):
            mine = [number for number, own in enumerate(limits) if own == limit]

            def keep(places: list[int], texts: list[str], mine: list[int] = mine) -> None:
                on_answers([mine[place] for place in places], texts)

            with self.using(choice.digest):
                generate_answers(
                    self.loaded.model,
                    self.loaded.tokenizer,
                    [conversations[number] for number in mine],
                    max_new_tokens=limit,
                    batch_size=BATCH,
                    on_batch=keep,
                )

    def room(self, messages: Sequence[Message], *, begun: bool = False) -> int:
        """How many tokens an answer to a conversation may have.

        Args:
            messages: ending with the user's turn.
            begun: a new conversation may be begun instead, without the earlier turns.

        Raises:
            UsageError: the model reads no more than the conversation, or less.
        """
        limit = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int):
            return UNLIMITED
        tokens = self._tokens(messages)
        if tokens < limit:
            return limit - tokens
        alone = begun and len(messages) > 1 and self._tokens(messages[-1:]) < limit
        raise UsageError(
            f"the conversation has {tokens:,} tokens; the model reads at most {limit:,} with its answer",
            "begin a new conversation" if alone else "ask something shorter",
        )

    def _tokens(self, messages: Sequence[Message]) -> int:
        from nest_runtime.prompts.examples import encode

        return len(encode(self.loaded.tokenizer, messages))

    def active(self) -> str | None:
        """The store's active patch of the model."""
        return next((entry.digest for entry in self.store.list(self.model_hash) if entry.active), None)

    def activate(self, entry: Entry) -> str:
        """Make a patch the store's active one, after the trust policy's checks. Raises what they raise."""
        from nest_runtime.trust.activate import SwitchRequest, activate

        patch = self.store.get(entry.digest)
        done = activate(self.store, patch, self._guard, SwitchRequest(why=WHY), model_hash=self.model_hash).entry
        return self._active(done)

    def rollback(self) -> str:
        """Go back in the store, after the trust policy's checks; a lower serial is allowed."""
        from nest_runtime.trust.activate import SwitchRequest, roll_back

        done = roll_back(self.store, self._guard, SwitchRequest(why=WHY), model_hash=self.model_hash).entry
        return self._active(done)

    def _active(self, entry: Entry) -> str:
        from nest_runtime.serve.running import running

        label = next((choice.label for choice in self.choices() if choice.digest == entry.digest), entry.key)
        beside = ", ".join(note.url for note in running(entry.base_hash))
        kept = f"; not switched: the running server at {beside}" if beside else ""
        return f"active: {label} ({short(entry.digest)}){kept}"

    @contextmanager
    def using(self, digest: str | None) -> Iterator[None]:
        """A context in which passes of this thread run under a patch, or under the base for None."""
        key = None if digest is None else self._key(digest)
        with self._passes.passing(), self.runtime.using(key):
            yield

    def _key(self, digest: str) -> str:
        """The patch's key in the runtime; checked, and put there first where it is new."""
        with self._lock:
            if digest not in self._keys:
                patch = self.patch(digest)
                if self._guard is not None:
                    self._guard.check(patch, allow_downgrade=True)  # to look at an older version is meant
                self._keys[digest] = self.runtime.add(patch, pause=self._passes.exclusive)
            return self._keys[digest]
