"""The OpenAI API over real HTTP, with the official client: answers, streams, sampling, refusals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nest_runtime.model.load import load_model
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import Allowed, Limits, ServeConfig
from nest_runtime.serve.requests.sampling import choose_tokens
from tests.support.patches import make_patch
from tests.support.serve import PROMPTS, Reference, Running, eventually, serving

VERSIONS = ("v1", "v2", "v3")
USER = [{"role": "user", "content": "How do I bake bread?"}]


@pytest.fixture(scope="module")
def patches(tiny_llama: Path) -> list[Patch]:
    loaded = load_model(tiny_llama)
    return [
        make_patch(loaded.model, version=version, seed=seed, scale=1.0, neurons=40, clusters=3, base_hash=loaded.hash)
        for seed, version in enumerate(VERSIONS, start=1)
    ]


@pytest.fixture(scope="module")
def server(tiny_llama: Path, patches: list[Patch], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    files = [str(patch.save(folder / f"{patch.version}.safetensors")) for patch in patches]
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setenv("NEST_HOME", str(folder / "home"))
        config = ServeConfig(
            model=str(tiny_llama),
            patch=files[2],
            expose=tuple(files[:2]),
            expose_base=True,
            port=0,
            max_queue=16,
            limits=Limits(running=32, max_choices=8, max_body_bytes=200_000, batch_tokens=64),
            allowed=Allowed(completions=True, special_tokens=True),
        )
        with serving(config) as running:
            yield running


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, patches: list[Patch]) -> Reference:
    return Reference(tiny_llama, patches)


@pytest.fixture
def slow_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 ms at least: a request of hundreds of tokens is still running when a test looks."""

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.01)
        return choose_tokens(*arguments)

    monkeypatch.setattr("nest_runtime.serve.transformers.continuous.choose_tokens", slowly)


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


def test_chat_equals_generate_and_names_its_patch(
    server: Running, client: openai.OpenAI, reference: Reference, patches: list[Patch]
) -> None:
    raw = client.chat.completions.with_raw_response.create(model=server.name, messages=USER, max_tokens=24)
    answer = raw.parse()
    assert answer.choices[0].message.content == reference.chat(USER[0]["content"], "v3", 24)
    assert raw.headers["x-nest-patch"] == "v3"
    assert raw.headers["x-nest-patch-digest"] == patches[2].digest
    assert answer.system_fingerprint == f"model={reference.loaded.hash};patch={patches[2].digest}"
    assert answer.object == "chat.completion"
    assert answer.model == server.name


def test_thirty_mixed_requests_at_once_equal_each_patch_alone(
    server: Running, client: openai.OpenAI, reference: Reference
) -> None:
    names = {"v3": server.name, "v1": f"{server.name}@v1", "v2": f"{server.name}@v2", None: f"{server.name}@base"}
    asked = [(PROMPTS[i % len(PROMPTS)] * (1 + i % 3), list(names)[i % 4], 8 + i % 17) for i in range(32)]

    def ask(case: tuple[str, str | None, int]) -> tuple[str | None, str]:
        prompt, version, count = case
        messages: list[Any] = [{"role": "user", "content": prompt}]
        raw = client.chat.completions.with_raw_response.create(
            model=names[version], messages=messages, max_tokens=count
        )
        return raw.parse().choices[0].message.content, raw.headers["x-nest-patch"]

    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(ask, asked))
    expected = [(reference.chat(p, v, n), v or "base") for p, v, n in asked]
    assert found == expected
    assert len({text for text, _ in found}) > 20


def test_a_stream_joined_is_the_whole_answer(server: Running, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=server.name, messages=USER, max_tokens=40)
    with client.chat.completions.with_streaming_response.create(
        model=server.name, messages=USER, max_tokens=40, stream=True, stream_options={"include_usage": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-nest-patch"] == "v3"
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1]["choices"] == []
    assert whole.usage is not None
    assert chunks[-1]["usage"] == whole.usage.to_dict()
    assert chunks[0]["usage"] is None
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["system_fingerprint"] == whole.system_fingerprint for chunk in chunks)


def test_usage_counts_tokens(server: Running, client: openai.OpenAI, reference: Reference) -> None:
    answer = client.completions.create(model=server.name, prompt=[PROMPTS[0], PROMPTS[1]], n=2, max_tokens=5)
    ids = [reference.loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(row) for row in ids)
    assert answer.usage.completion_tokens == 4 * 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text


def test_completions_take_text_and_token_ids(server: Running, client: openai.OpenAI, reference: Reference) -> None:
    ids = reference.loaded.tokenizer(PROMPTS[0])["input_ids"]
    expected = reference.loaded.tokenizer.decode(reference.tokens(ids, "v3", 16), skip_special_tokens=True)
    for prompt in (PROMPTS[0], ids, [ids]):
        answer = client.completions.create(model=server.name, prompt=prompt)
        assert answer.choices[0].text == expected  # 16 tokens are the default, as OpenAI's
    stream = client.completions.create(model=server.name, prompt=ids, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_the_end_of_sequence_ends_an_answer(server: Running, client: openai.OpenAI, reference: Reference) -> None:
    """A random model rarely ends, so a token of its answer is declared the end on both sides."""
    ids = reference.loaded.tokenizer(PROMPTS[0])["input_ids"]
    tokens = reference.tokens(ids, "v3", 30)
    end = tokens[10]
    engine = server.server.service.engine
    engine.eos, before = (*engine.eos, end), engine.eos
    try:
        answer = client.completions.create(model=server.name, prompt=ids, max_tokens=30)
    finally:
        engine.eos = before
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens.index(end) + 1


def test_stop_strings_end_the_answer_and_are_left_out(server: Running, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=server.name, messages=USER, max_tokens=60).choices[0].message.content
    assert whole is not None
    stop = whole[20:23]
    cut = whole[: whole.index(stop)]
    for stops in (stop, [stop, "never said"]):
        answer = client.chat.completions.create(model=server.name, messages=USER, max_tokens=60, stop=stops)
        assert answer.choices[0].message.content == cut
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens < 60
        stream = client.chat.completions.create(
            model=server.name, messages=USER, max_tokens=60, stop=stops, stream=True
        )
        deltas = [chunk.choices[0] for chunk in stream]
        assert "".join(delta.delta.content or "" for delta in deltas) == cut
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert eventually(lambda: server.server.service.engine.jobs == 0)


def test_a_seed_repeats_an_answer_in_any_company(server: Running, client: openai.OpenAI) -> None:
    def ask(seed: int | None, **more: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model=server.name, messages=USER, temperature=1.0, top_p=0.95, seed=seed, max_tokens=30, **more
        )
        return [choice.message.content for choice in answer.choices]

    alone = ask(11)
    with ThreadPoolExecutor(12) as pool:
        noise = [pool.submit(ask, None) for _ in range(6)]
        crowd = [pool.submit(ask, 11) for _ in range(6)]
        assert [job.result() for job in crowd] == [alone] * 6
        assert len({job.result()[0] for job in noise}) > 1
    assert ask(12) != alone
    several = ask(11, n=3)
    assert several[:1] == alone
    assert len(set(several)) == 3
    assert ask(11, n=3) == several


def test_temperature_is_each_requests_own(server: Running, client: openai.OpenAI, reference: Reference) -> None:
    greedy = reference.chat(USER[0]["content"], "v3", 30)

    def ask(temperature: float) -> str | None:
        answer = client.chat.completions.create(
            model=server.name, messages=USER, temperature=temperature, max_tokens=30
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [0.0, 2.0] * 4))
    assert found[::2] == [greedy] * 4
    assert all(text != greedy for text in found[1::2])


def test_models_are_the_exposed_names(server: Running, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [server.name, f"{server.name}@v1", f"{server.name}@v2", f"{server.name}@base"]
    assert client.models.retrieve(f"{server.name}@v1").id == f"{server.name}@v1"


@pytest.mark.parametrize("model", ["gpt-4", "tiny-llama@v3", "tiny-llama@v9", "tiny-llama@", "x/tiny-llama@v1"])
def test_unknown_and_unexposed_models_are_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=USER)
    assert caught.value.code == "model_not_found"
    assert caught.value.response.json()["error"]["message"] == (
        f"The model `{model}` does not exist or you do not have access to it."
    )
    assert caught.value.response.headers["x-nest-patch"] == "v3"


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 9}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens", "context_length_exceeded"),
    ({"stop": [""]}, "stop.0", "invalid_value"),
    ({"stop": [str(i) for i in range(17)]}, "stop", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "invalid_value"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logit_bias": {"5": 100}}, "logit_bias", "unsupported_parameter"),
    ({"response_format": {"type": "regex"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "not_allowed"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD)
def test_bad_requests_name_the_field(
    server: Running, client: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str
) -> None:
    body = {"model": server.name, "messages": USER, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=httpx.Response)
    error = caught.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [5, 9999]},
        {"prompt": "x", "echo": True},
        {"prompt": "x", "logprobs": -1},
    ],
)
def test_bad_completions_are_refused(server: Running, fields: dict[str, Any]) -> None:
    response = server.http("POST", "/v1/completions", json={"model": server.name, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("prompt", "echo", "logprobs")


def test_a_prompt_longer_than_the_context_is_refused(server: Running, client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "bread " * 700}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=server.name, messages=long)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in caught.value.message


def test_the_context_can_be_used_to_its_last_token(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=server.name, prompt=[7] * 400, max_tokens=112)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    chat = client.chat.completions.create(model=server.name, messages=USER)
    assert chat.usage is not None
    assert chat.usage.total_tokens == 512


def test_bodies_that_are_no_request(server: Running) -> None:
    broken = server.http("POST", "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert broken.json()["error"]["code"] == "invalid_json"
    large = server.http("POST", "/v1/chat/completions", content=b" " * 200_001)
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "body_too_large"
    chunked = server.http("POST", "/v1/chat/completions", content=(b" " * 1000 for _ in range(300)))
    assert chunked.status_code == 413
    lost = server.http("GET", "/v1/nothing")
    assert lost.status_code == 404
    assert "Invalid URL" in lost.json()["error"]["message"]
    wrong = server.http("GET", "/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"] == "Not allowed: GET; use POST"
    for response in (broken, large, chunked, lost):
        assert response.headers["x-nest-patch"] == "v3"
        assert response.headers["x-request-id"]


def test_request_ids_are_kept(server: Running) -> None:
    assert server.http("GET", "/v1/models", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = server.http("GET", "/v1/models", headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert len(made) == 32


def test_messages_of_parts_and_of_developers(server: Running, client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model=server.name, messages=[{"role": "system", "content": "Be brief."}, *USER], max_tokens=9
    )
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *USER,
    ]
    same = client.chat.completions.create(model=server.name, messages=parts, max_tokens=9)
    assert same.choices[0].message.content == plain.choices[0].message.content


def test_tools_reach_the_template(server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = server.server.service.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ tools | length if tools else 'no' }} {{ messages[-1].role }}")
    tools: list[Any] = [{"type": "function", "function": {"name": "bake", "description": "", "parameters": {}}}]
    turns: list[Any] = [*USER, {"role": "tool", "tool_call_id": "1", "content": "baked"}]

    def prompt_tokens(**more: Any) -> int:
        answer = client.chat.completions.create(model=server.name, messages=turns, max_tokens=1, **more)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    def expected(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert prompt_tokens(tools=tools) == expected("1 tool")
    assert prompt_tokens(tools=tools, tool_choice="none") == prompt_tokens() == expected("no tool")


def test_a_full_queue_answers_429_with_retry_after(server: Running, client: openai.OpenAI, slow_engine: None) -> None:
    """48 sequences fit (32 running, 16 waiting); 7 requests of 8 do not."""
    started = threading.Barrier(7)
    refused: list[openai.RateLimitError] = []

    def ask(_: int) -> None:
        started.wait()
        try:
            client.chat.completions.create(model=server.name, messages=USER, n=8, temperature=1, max_tokens=60)
        except openai.RateLimitError as error:
            refused.append(error)

    with ThreadPoolExecutor(7) as pool:
        for job in [pool.submit(ask, number) for number in range(7)]:
            job.result()
    assert len(refused) == 1
    assert int(refused[0].response.headers["retry-after"]) >= 1
    assert refused[0].code == "queue_full"
    assert client.chat.completions.create(model=server.name, messages=USER, max_tokens=1).choices


def test_a_client_that_leaves_stops_its_request(server: Running, slow_engine: None) -> None:
    engine = server.server.service.engine
    body = {"model": server.name, "messages": USER, "max_tokens": 450}
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()  # kept: a dropped iterator closes the connection
        assert next(lines).startswith("data:")
        assert engine.live == 1
    assert eventually(lambda: engine.live == 0 and engine.jobs == 0, 20)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.2)
    assert eventually(lambda: engine.live == 0 and engine.jobs == 0, 20)
    assert "nest_canceled_requests_total 2.0" in server.http("GET", "/metrics").text


def test_probes_and_metrics(server: Running, client: openai.OpenAI, patches: list[Patch]) -> None:
    client.chat.completions.create(model=f"{server.name}@v1", messages=USER, max_tokens=4)
    assert server.http("GET", "/health").json() == {"status": "ok"}
    ready = server.http("GET", "/ready").json()
    assert ready == {"status": "ready", "model": server.name, "patch": "v3", "digest": patches[2].digest}
    text = server.http("GET", "/metrics").text
    assert 'nest_requests_total{endpoint="/v1/chat/completions",patch="v1",status="200"}' in text
    assert 'nest_tokens_total{kind="completion",patch="v1"}' in text
    assert 'nest_time_to_first_token_seconds_count{patch="v1"}' in text
    assert f'nest_active_patch_info{{digest="{patches[2].digest}",patch="v3"}} 1.0' in text
    assert "nest_engine_alive 1.0" in text


def test_there_is_no_admin_api_without_a_token_file(server: Running) -> None:
    for method, path in (("GET", "/v1/patches"), ("POST", "/v1/patches/activate"), ("GET", "/v1/audit")):
        response = server.http(method, path, headers={"authorization": "Bearer anything"})
        assert response.status_code == 404
        assert "Invalid URL" in response.json()["error"]["message"]


def test_the_schema_names_every_route(server: Running) -> None:
    paths = server.http("GET", "/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)
    assert set(paths["/v1/completions"]["post"]["responses"]) == {"200", "4XX", "5XX"}
