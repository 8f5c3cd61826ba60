"""Tokens at the edges: those the model has no row for, those that end an answer, and those that stop strings name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_runtime.errors import DataError
from nest_runtime.model.load import load_model
from nest_runtime.prompts.examples import make_examples
from nest_runtime.prompts.generate import end_token_ids, generate_answers, pad_token_id
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.requests.detokenize import AnswerText
from nest_runtime.train.pipeline import train_patch
from tests.conftest import CHAT_TEMPLATE, make_tokenizer, save_tiny
from tests.support.serve import serving
from tests.support.train import QUICK

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": "Mix"}]


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 rows whose tokenizer was given a ``[PAD]`` of its own, token 300."""
    folder = save_tiny(tmp_path_factory.mktemp("padded") / "model", "LlamaForCausalLM", "LlamaConfig")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("pad_token_id", None)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_tokens_that_the_model_has_no_row_for_are_refused(config: ServeConfig, padded: Path) -> None:
    with serving(replace(config, model=str(padded), patch=None)) as server:
        for path, body, param in (
            ("/v1/completions", {"prompt": [5, 300]}, "prompt"),
            ("/v1/completions", {"prompt": [[5], [6, 300]]}, "prompt"),
            ("/v1/completions", {"prompt": [-1]}, "prompt"),
            ("/v1/completions", {"prompt": "a [PAD] b"}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a [PAD] b"}]}, "messages"),
        ):
            refused = server.http("POST", path, json={"model": server.name, "max_tokens": 3, **body})
            if refused.status_code == 200:  # text that is split into tokens that the model does know
                assert isinstance(body.get("prompt"), str) or "messages" in body
                continue
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), body
            assert "out of range [0, 300)" in refused.json()["error"]["message"]
        answered = server.http("POST", "/v1/completions", json={"model": server.name, "prompt": [5], "max_tokens": 3})
        assert answered.status_code == 200
        assert server.http("GET", "/health").status_code == 200


def test_evaluation_and_training_pad_with_a_token_that_has_a_row(padded: Path, tiny_llama: Path) -> None:
    loaded, same = load_model(padded), load_model(tiny_llama)
    same.model.load_state_dict(loaded.model.state_dict())
    assert pad_token_id(loaded.model, loaded.tokenizer) < 300
    conversations = [[{"role": "user", "content": text}] for text in ("Mix", "How do I bake bread?", "I cannot")]
    answers = generate_answers(loaded.model, loaded.tokenizer, conversations, max_new_tokens=8)
    assert answers == generate_answers(same.model, same.tokenizer, conversations, max_new_tokens=8)
    with torch.inference_mode():  # a row that ends early is padded by generate itself
        loaded.model.generate(torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3)
    harmful = make_examples([{"prompt": f"harm {word} and {word}"} for word in ("one", "two more words", "x", "y z")])
    benign = make_examples([{"prompt": f"bread {word}", "response": "Mix."} for word in ("a", "b c d e", "f", "g")])
    recipe = QUICK.evolve(steps=1, validate_every=1, probe_steps=20)
    assert train_patch(
        loaded.model, loaded.tokenizer, harmful, benign, recipe=recipe, name="p", version="v1", base_hash=loaded.hash
    )
    loaded.tokenizer.chat_template = f"[PAD]{CHAT_TEMPLATE}"
    with pytest.raises(DataError, match="embedding has 300 rows"):
        generate_answers(loaded.model, loaded.tokenizer, conversations)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_folder(folder: Path, template: str, configured: Any, eos: str = "</s>") -> Path:
    """A tiny model whose three sources of ends are chosen apart."""
    save_tiny(folder, "LlamaForCausalLM", "LlamaConfig", vocab_size=310)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|other|>"]})
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": configured}))
    return folder


@pytest.mark.parametrize(
    ("template", "configured", "eos", "ends"),
    [
        (CHATML, 302, "</s>", [2, 301, 302]),  # the config says one thing, the tokenizer another, the template a third
        (CHATML, [302, 2], "<|im_end|>", [2, 301, 302]),
        (CHATML, None, "</s>", [2, 301]),  # the model's own config has </s>
        (CHATML.replace("<|im_end|>", ""), 302, "</s>", [2, 302]),  # a template that writes no end
        (CHATML.replace("}}<|im_end|>", "}}  \n<|im_end|>"), 2, "</s>", [2, 301]),
        (CHAT_TEMPLATE, 2, "</s>", [2]),
        ("", [2, 302], "</s>", [2, 302]),
        ("{{ raise_exception('prompts only') }}", 302, "</s>", [2, 302]),
    ],
)
def test_one_function_knows_every_end(
    tmp_path: Path, template: str, configured: Any, eos: str, ends: list[int]
) -> None:
    loaded = load_model(make_folder(tmp_path / "m", template, configured, eos))
    assert end_token_ids(loaded.model, loaded.tokenizer) == ends


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """Its generation config ends at token 302, its tokenizer at <|im_end|>; it says "I cannot<|im_end|>I cannot…"."""
    folder = make_folder(tmp_path / "chatml", CHATML, 302, "</s>")
    loaded = load_model(folder)
    cycle = [*loaded.tokenizer("I cannot", add_special_tokens=False)["input_ids"], 301]
    after = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    model = loaded.model
    with torch.no_grad():  # a table of successors: embeddings are one-hot, the layers add nothing, the head looks up
        width = model.config.hidden_size
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        newline = loaded.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        places = {token: place for place, token in enumerate({**after, newline: cycle[0]})}
        assert len(places) < width
        for token, follower in {**after, newline: cycle[0]}.items():
            model.model.embed_tokens.weight[token, places[token]] = 1
            model.lm_head.weight[follower, places[token]] = 1
    model.save_pretrained(folder)
    return folder


def test_serve_chat_and_evaluation_end_where_the_template_does(config: ServeConfig, chatml: Path) -> None:
    loaded = load_model(chatml)
    assert generate_answers(loaded.model, loaded.tokenizer, [USER], max_new_tokens=40) == ["I cannot"]
    with serving(replace(config, model=str(chatml), patch=None)) as server:
        body = {"model": server.name, "messages": USER, "max_tokens": 40}
        choice = server.http("POST", "/v1/chat/completions", json=body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("I cannot", "stop")


def test_stop_strings_match_special_tokens(config: ServeConfig, chatml: Path) -> None:
    path = chatml / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    (chatml / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", ""))
    loaded = load_model(chatml)
    assert end_token_ids(loaded.model, loaded.tokenizer) == [2, 302]
    more = generate_answers(loaded.model, loaded.tokenizer, [USER], max_new_tokens=20)[0]
    assert more.startswith("I cannotI cannot")
    for stop in ("<|im_end|>", "not<|im_end|>I"):
        answer = generate_answers(loaded.model, loaded.tokenizer, [USER], max_new_tokens=20, stop=[stop])[0]
        assert answer == "I cannot".removesuffix("not" if stop.startswith("not") else "")
    with serving(replace(config, model=str(chatml), patch=None)) as server:
        body = {"model": server.name, "messages": USER, "max_tokens": 40}
        for stop, text in (("<|im_end|>", "I cannot"), ("not<|im_end|>I", "I can"), ("nowhere", None)):
            choice = server.http("POST", "/v1/chat/completions", json={**body, "stop": [stop]}).json()["choices"][0]
            reason, content = choice["finish_reason"], choice["message"]["content"]
            assert (reason, content) == ("stop", text) if text else reason == "length"
            streamed: Any = server.client().chat.completions.create(
                model=server.name,
                messages=USER,
                max_tokens=40,
                stop=[stop],
                stream=True,
            )
            assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == content


def test_special_tokens_are_matched_and_never_shown() -> None:
    tokenizer = make_tokenizer()
    words = tokenizer("flour", add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|user|>")
    for stops, shown in (
        (["<|user|>"], "flour"),
        (["r<|user|>f"], "flou"),
        (["<|user|>flour<|user|>"], "flour"),
        (["<|us"], "flour"),
        (["<|system|>"], "flourflourflour"),
        ([], "flourflourflour"),
    ):
        answer = AnswerText(tokenizer, stops)
        text = "".join(answer.add(token) for token in [*words, special, *words, special, *words])
        assert text + answer.finish() == shown, stops
