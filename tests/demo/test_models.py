"""The demo over models of other families: answers, and activations that are what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_runtime.demo.local import LocalBackend
from nest_runtime.demo.probe import activations
from nest_runtime.demo.start import Source, open_demo
from nest_runtime.demo.tabs.chat import Chat
from nest_runtime.demo.tabs.neurons import ALL, Neurons, map_html
from nest_runtime.demo.talk import Talk
from nest_runtime.errors import UsageError
from nest_runtime.model.anatomy import find_projections, module_of
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import encode
from tests.conftest import save_tiny
from tests.support.patches import attached, make_patch

ASKED = [{"role": "user", "content": "How do I bake bread?"}]
KINDS = {"llama": ("LlamaForCausalLM", "LlamaConfig"), "fused": ("Phi3ForCausalLM", "Phi3Config")}


@pytest.fixture(params=list(KINDS))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A desk over a tiny model and a patch of it in a file."""
    folder = save_tiny(tmp_path / request.param, *KINDS[request.param])
    patch = make_patch(load_model(folder).model, neurons=7, clusters=2, scale=0.5, loadings=True)
    file = patch.save(tmp_path / "v1.safetensors")
    return open_demo(Source(str(folder), str(file)), max_tokens=6), patch


def outputs(backend: LocalBackend, site: str) -> np.ndarray:
    """A projection's raw outputs [tokens, d_out] under whatever is on, read without the demo."""
    model = backend.loaded.model
    projection = next(p for p in find_projections(model) if p.name == site)
    kept: list[torch.Tensor] = []
    handle = module_of(model, projection).register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([encode(backend.loaded.tokenizer, ASKED)]))
    finally:
        handle.remove()
    return kept[0][0, :, projection.rows(torch.arange(projection.d_out))].double().numpy()


def test_answers_and_activations(opened: tuple[Any, Any]) -> None:
    state, patch = opened
    talk = Talk()
    pages = [page for page, *_ in Chat(state).ask(ASKED[0]["content"], "v1", True, talk)]
    left, right = talk.turns[0].replies
    assert (left.state, right.state) == ("done", "done")
    assert right.digest == patch.digest
    assert patch.digest[:19] in pages[-1]

    backend, site = state.local, patch.sites[-1]
    before = attached(backend.loaded.model)
    found = activations(backend, patch.digest, "v1", ASKED, site.name)
    tokenizer = backend.loaded.tokenizer
    assert len(found.tokens) == len(encode(tokenizer, ASKED))
    own = encode(tokenizer, ASKED)[found.first :]
    assert str(tokenizer.decode(own)).lstrip().startswith("How do")  # what the template puts before is left of it
    assert found.first > 0
    order = [int(row.split()[1]) for row in found.rows]  # "neuron 12 (c0)"
    assert sorted(order) == site.neurons.tensor().tolist()
    with backend.using(None):
        plain = outputs(backend, site.name)
    with backend.using(patch.digest):
        patched = outputs(backend, site.name)
    assert np.allclose(found.base, plain[:, order].T, atol=1e-5)
    assert np.allclose(found.patched, patched[:, order].T, atol=1e-5)
    assert np.abs(found.patched - found.base).max() > 1e-3

    whole = activations(backend, patch.digest, "v1", ASKED)
    assert whole.base.shape == (sum(s.n_clusters for s in patch.sites), len(found.tokens))
    mine = [
        n for n, row in enumerate(whole.rows) if row.startswith(f"layer 1 {'up' if 'up' in site.name else 'gate'} ")
    ]
    clusters = site.clusters.tensor().numpy()
    means = [plain[:, site.neurons.tensor().numpy()[clusters == k]].mean(axis=1) for k in range(site.n_clusters)]
    assert np.allclose(whole.base[mine], means, atol=1e-5)
    assert attached(backend.loaded.model) == before


def test_the_page_of_its_neurons(opened: tuple[Any, Any]) -> None:
    state, patch = opened
    drawn = map_html(state, patch.digest)
    assert drawn.count("data-neuron") == patch.neurons
    tab = Neurons(state)
    assert "Nothing has been asked" in last(tab.activations(patch.digest, ALL, "", Talk()))
    assert "no patch is chosen" in last(tab.activations(None, ALL, "Hello", Talk()))
    steps = list(tab.activations(patch.digest, ALL, "Hello", Talk()))
    assert "Computing" in steps[0]
    assert "Base: 8 rows" in steps[-1]
    assert "Base and patched: mean output of a cluster&#x27;s neurons, before the activation function." in steps[-1]
    assert "Change: patched minus base." in steps[-1]


def last(steps: Iterator[Any]) -> Any:
    """What stands there in the end."""
    return list(steps)[-1]


def test_activations_of_a_long_prompt_show_its_beginning_and_of_a_too_long_one_say_so(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest_runtime.demo import probe

    state, patch = opened
    tab = Neurons(state)
    long = last(tab.activations(patch.digest, ALL, "x" * 400, Talk()))
    assert f"Prompt: {'x' * 300}…<" in long
    monkeypatch.setattr(probe, "_read", None)  # nothing is computed
    said = last(tab.activations(patch.digest, ALL, "x" * 20_000, Talk()))
    assert "the model reads at most 512 with its answer" in said
    assert "ask something shorter" in said


def test_all_wrappings_of_something_too_long_are_refused_at_once(
    opened: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest_runtime.demo.background import Running
    from nest_runtime.demo.examples import wrapped
    from nest_runtime.prompts import generate

    state, _ = opened
    monkeypatch.setattr(generate, "answer_conversations", None)  # nothing is generated
    _, why = last(Chat(state).grid("x" * 20_000, "v1", True, Running()))
    assert "the prompt has 20,000 characters; the page wraps up to 1,500, wrapping included" in why
    monkeypatch.setattr(
        type(state), "offer", replace(state.offer, wrap=wrapped)
    )  # the reference world's, of any length
    grid, why = last(Chat(state).grid("x" * 20_000, "v1", True, Running()))
    assert grid == ""  # no bar that goes on
    assert "the model reads at most 512 with its answer" in why
    assert "ask something shorter" in why


def test_a_batch_is_never_answered_beyond_what_the_model_reads(opened: tuple[Any, Any]) -> None:
    from nest_runtime.prompts.chat import answer_chat

    state, _ = opened
    backend, base = state.local, state.backend.choices()[0]
    long: list[dict[str, str]] = [{"role": "user", "content": ""}]
    while backend.room(long) > 3:
        long = [{"role": "user", "content": f"{long[0]['content']}{'bread ' if backend.room(long) > 12 else 'x'}"}]
    talks, found = [ASKED, long, ASKED], dict[int, str]()
    backend.answer_all(
        talks, base, max_tokens=6, on_answers=lambda places, texts: found.update(zip(places, texts, strict=True))
    )
    model, tokenizer = backend.loaded.model, backend.loaded.tokenizer
    assert [found[n] for n in range(3)] == [answer_chat(model, tokenizer, talk, max_tokens=6).text for talk in talks]
    tokens = encode(tokenizer, long)
    assert len(tokens) + backend.room(long) == model.config.max_position_embeddings
    too_long = [{"role": "user", "content": "bread " * 600}]
    with pytest.raises(UsageError) as chat:
        answer_chat(model, tokenizer, too_long, max_tokens=6)
    with pytest.raises(UsageError) as batch:
        backend.answer_all([ASKED, too_long], base, max_tokens=6, on_answers=lambda places, texts: None)
    assert batch.value.message == chat.value.message


def test_too_long_a_conversation_is_a_message(opened: tuple[Any, Any]) -> None:
    state, _ = opened
    chat, talk = Chat(state), Talk()
    pages = [page for page, *_ in chat.ask("bread " * 600, "v1", True, talk)]
    assert talk.turns[0].replies[1].state == "failed"
    assert "ask something shorter" in pages[-1]
    talk = Talk()
    list(chat.ask("Hello", "v1", True, talk))
    assert talk.turns[0].replies[1].state == "done"
    pages = [page for page, *_ in chat.ask("bread " * 600, "v1", True, talk)]
    assert talk.turns[1].replies[1].state == "failed"
    assert "begin a new conversation" not in pages[-1]  # the message alone is too long
    assert "ask something shorter" in pages[-1]
    half = "bread " * 40
    while state.local.room([{"role": "user", "content": half}]) > 200:
        half += "bread "
    talk = Talk()
    list(chat.ask(half, "v1", True, talk))
    pages = [page for page, *_ in chat.ask(half, "v1", True, talk)]
    assert "begin a new conversation" in pages[-1]
