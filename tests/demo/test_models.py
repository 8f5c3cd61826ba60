"""The demo over models of other families: answers, and activations that are what the model computes."""

from __future__ import annotations

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
    assert "Nothing has been asked" in tab.activations(patch.digest, ALL, "", Talk())
    assert "Base: 8 rows" in tab.activations(patch.digest, ALL, "Hello", Talk())
    assert "no patch is chosen" in tab.activations(None, ALL, "Hello", Talk())


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
    assert "begin a new conversation" in pages[-1]
