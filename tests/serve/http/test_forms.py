"""What clients ask for beside text: log probabilities, JSON, penalties, template settings, and the Responses API.

By OpenAI's own client, on both engines where an engine decides it; held to what ``model.generate`` computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from nest_runtime.patch.patch import Patch
from nest_runtime.prompts.examples import encode
from nest_runtime.serve import Allowed, ServeConfig
from tests.support.serve import PROMPTS, Reference, Running, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[0]}]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "cross"]}, "count": {"type": "integer", "minimum": 3, "maximum": 5}},
    "required": ["mood", "count"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}


@pytest.fixture(params=["transformers", "generate"])
def server(request: pytest.FixtureRequest, config: ServeConfig) -> Iterator[Running]:
    allowed = Allowed(completions=True, schemas=True)
    with serving(replace(config, engine=request.param, allowed=allowed, expose_base=True)) as running:
        yield running


@pytest.fixture
def truth(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


def refused(call: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    return caught.value


def spelled(entries: Any) -> bytes:
    """The text that tokens spell together: one may be a part of a character."""
    return b"".join(bytes(entry.bytes) for entry in entries)


def test_log_probabilities_are_the_models_own(server: Running, truth: Reference) -> None:
    client = server.client()
    said = client.chat.completions.create(
        model=server.name, messages=USER, max_tokens=12, logprobs=True, top_logprobs=3
    ).choices[0]
    assert said.logprobs is not None
    assert said.logprobs.content is not None
    ids = encode(truth.loaded.tokenizer, USER)
    with truth.runtime.using("v1"), torch.inference_mode():
        for entry, token in zip(said.logprobs.content, truth.tokens(ids, "v1", 12), strict=False):
            odds = torch.log_softmax(truth.loaded.model(torch.tensor([ids])).logits[0, -1].double(), -1)
            best = odds.topk(3).values.tolist()
            assert math.isclose(entry.logprob, odds[token].item(), abs_tol=1e-3)
            assert [found.logprob for found in entry.top_logprobs] == pytest.approx(best, abs=1e-3)
            ids.append(token)
    assert spelled(said.logprobs.content).decode(errors="replace") == said.message.content
    plain = client.chat.completions.create(model=server.name, messages=USER, max_tokens=12).choices[0]
    assert plain.logprobs is None
    assert plain.message.content == said.message.content


def test_streamed_log_probabilities_are_those_of_the_whole_answer(server: Running) -> None:
    client = server.client()
    wanted: dict[str, Any] = {"model": server.name, "messages": USER, "max_tokens": 12, "logprobs": True}
    whole = client.chat.completions.create(**wanted).choices[0].logprobs
    assert whole is not None
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**wanted, stream=True)]
    parts = [part for chunk in chunks if chunk.logprobs for part in chunk.logprobs.content or ()]
    assert [part.token for part in parts] == [entry.token for entry in whole.content or ()]
    assert parts
    told = client.completions.create(model=server.name, prompt=PROMPTS[0], max_tokens=6, logprobs=2).choices[0]
    assert told.logprobs is not None
    assert len(told.logprobs.tokens or ()) == 6
    assert [len(top) for top in told.logprobs.top_logprobs or ()] == [2] * len(told.logprobs.tokens or ())


def test_what_a_stop_string_cuts_has_no_log_probabilities(server: Running) -> None:
    client = server.client()
    wanted: dict[str, Any] = {"model": server.name, "messages": USER, "max_tokens": 24, "logprobs": True}
    text = client.chat.completions.create(**wanted).choices[0].message.content
    assert text
    stop = text[6:9]
    cut = client.chat.completions.create(**wanted, stop=stop).choices[0]
    assert cut.logprobs is not None
    joined = spelled(cut.logprobs.content or []).decode(errors="replace")
    assert joined.startswith(cut.message.content or "")
    assert len(joined) < len(text)


def test_answers_keep_to_json_and_to_schemas_beside_answers_that_do_not(server: Running, truth: Reference) -> None:
    client = server.client()
    for seed in range(3):
        said = client.chat.completions.create(
            model=server.name, messages=USER, max_tokens=200, response_format=FORMAT, temperature=1.5, seed=seed
        ).choices[0]
        value = json.loads(said.message.content or "")
        assert value["mood"] in ("calm", "cross")
        assert value["count"] in (3, 4, 5)
        assert said.finish_reason == "stop"
    free = client.chat.completions.create(
        model=server.name, messages=USER, max_tokens=60, response_format={"type": "json_object"}
    ).choices[0]
    assert (free.message.content or "").startswith("{")
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content or ""), dict)
    plain = client.chat.completions.create(
        model=server.name, messages=USER, max_tokens=12, response_format={"type": "text"}
    )
    assert plain.choices[0].message.content == truth.chat(PROMPTS[0], "v1", 12)


def test_a_schema_is_the_operators_choice_and_has_to_be_one(config: ServeConfig, server: Running) -> None:
    def ask(running: Running, form: Any) -> Any:
        return running.client().chat.completions.create(
            model=running.name, messages=USER, max_tokens=8, response_format=form
        )

    for schema, word in (
        ({"type": "strin"}, "strin"),
        ({"not": {}}, "not"),
        ({"$ref": "http://127.0.0.1:9/x"}, "127.0.0.1"),
        ({"enum": ["x" * 70000]}, "65536"),
    ):
        error = refused(
            lambda schema=schema: ask(server, {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
        )
        assert (error.param, error.code) == ("response_format", "invalid_value")
        assert word in error.message
    assert refused(lambda: ask(server, {"type": "json_schema"})).param == "response_format.json_schema"
    assert refused(lambda: ask(server, {"type": "yaml"})).param == "response_format.type"
    with serving(config) as closed:
        error = refused(lambda: ask(closed, FORMAT))
        assert error.code == "not_allowed"
        assert "--allow-json-schema" in error.message
        assert ask(closed, {"type": "json_object"}).choices[0].message.content.startswith("{")


def test_without_the_package_a_form_is_refused_in_a_sentence(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llguidance" else found(name, *a))
    with serving(config) as server:
        error = refused(
            lambda: server.client().chat.completions.create(
                model=server.name, messages=USER, response_format={"type": "json_object"}
            )
        )
        assert error.code == "unsupported_parameter"
        assert "pip install llguidance" in error.message


def test_a_repetition_penalty_counts_the_answers_own_tokens(server: Running) -> None:
    client = server.client()

    def tokens(**more: Any) -> list[str]:
        said = client.chat.completions.create(
            model=server.name, messages=USER, max_tokens=40, logprobs=True, extra_body=more
        ).choices[0]
        assert said.logprobs is not None
        return [entry.token for entry in said.logprobs.content or ()]

    plain, held = tokens(), tokens(repetition_penalty=2.0)
    assert tokens(repetition_penalty=1.0) == plain
    assert plain[0] == held[0]  # nothing is repeated yet, whatever the prompt holds
    assert len(set(held)) > len(set(plain))
    assert refused(lambda: tokens(repetition_penalty=3)).param == "repetition_penalty"


def test_template_settings_reach_the_template_and_nothing_else_does(
    config: ServeConfig, tmp_path: Path, tiny_llama: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "thinking"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking is false %}no thought{% endif %}"
    tokenizer.save_pretrained(folder)
    with serving(replace(config, model=str(folder), patch=None)) as server:
        client = server.client()

        def prompt_tokens(**settings: Any) -> int:
            said = client.chat.completions.create(
                model=server.name, messages=USER, max_tokens=1, extra_body={"chat_template_kwargs": settings}
            )
            assert said.usage is not None
            return said.usage.prompt_tokens

        assert prompt_tokens(enable_thinking=False) > prompt_tokens(enable_thinking=True) == prompt_tokens(other="low")
        for settings in (
            {"chat_template": "x"},
            {"messages": 1},
            {"eos_token": "x"},
            {"add_generation_prompt": False},
            {"style": "</s> two words"},
            {"style": ["x"]},
        ):
            error = refused(lambda settings=settings: prompt_tokens(**settings))
            assert (error.param, error.code) == ("chat_template_kwargs", "unsupported_parameter"), settings


def test_responses_are_the_chats_answers(server: Running) -> None:
    client = server.client()
    chat = client.chat.completions.create(
        model=server.name, messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=12
    )
    said = client.responses.create(
        model=server.name,
        input=PROMPTS[0],
        instructions="Be brief.",
        max_output_tokens=12,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    assert said.output_text == chat.choices[0].message.content
    assert (said.status, chat.choices[0].finish_reason) in (("completed", "stop"), ("incomplete", "length"))
    assert chat.usage is not None
    assert said.usage is not None
    assert (said.usage.input_tokens, said.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    content: Any = said.output[0]
    assert spelled(content.content[0].logprobs).decode(errors="replace") == said.output_text
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": PROMPTS[0]}]}]
    assert client.responses.create(model=f"{server.name}@base", input=parts, max_output_tokens=4).output_text


def test_streamed_responses_join_to_the_whole(server: Running) -> None:
    client = server.client()
    wanted: dict[str, Any] = {"model": server.name, "input": PROMPTS[0], "max_output_tokens": 12}
    whole = client.responses.create(**wanted)
    events = list(client.responses.create(**wanted, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    joined = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert joined == whole.output_text == last.response.output_text
    form: Any = {"format": {"type": "json_schema", "name": "mood", "schema": SCHEMA, "strict": True}}
    with client.responses.stream(**{**wanted, "max_output_tokens": 200}, text=form) as stream:  # its own accumulator
        assert json.loads(stream.get_final_response().output_text)["count"] in (3, 4, 5)


def test_responses_with_tools_and_forms(server: Running) -> None:
    client = server.client()
    tools: Any = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}]
    history: Any = [
        {"role": "user", "content": "Look."},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "a loaf"},
    ]
    said = client.responses.create(model=server.name, input=history, tools=tools, max_output_tokens=4)
    assert said.output[0].type == "message"
    formed = client.responses.create(
        model=server.name,
        input=PROMPTS[0],
        max_output_tokens=200,
        text={"format": {"type": "json_schema", "name": "mood", "schema": SCHEMA, "strict": True}},
    )
    assert json.loads(formed.output_text)["count"] in (3, 4, 5)
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ):
        error = refused(
            lambda fields=fields: client.responses.create(model=server.name, input="a", **fields)  # type: ignore[arg-type]
        )
        assert error.param == param, error.message
