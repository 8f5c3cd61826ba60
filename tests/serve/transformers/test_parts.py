"""The server's parts that need no server: sampling, text, tokens, audit, errors' shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_runtime.errors import StoreError, UsageError
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.requests.detokenize import AnswerText, Detokenizer, StopScanner
from nest_runtime.serve.requests.sampling import Sampler, SamplingParams, choose_tokens
from nest_runtime.serve.switching.audit import AuditLog
from nest_runtime.serve.tokens import read_tokens
from tests.conftest import make_tokenizer


def test_greedy_rows_take_the_likeliest_token_beside_sampled_rows() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(temperature=float(row % 2), seed=row)) for row in range(8)]
    chosen = choose_tokens(logits, samplers)
    assert chosen[::2].tolist() == logits.argmax(-1)[::2].tolist()


def test_a_seeded_row_does_not_depend_on_its_neighbors() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=7)

    def alone() -> list[int]:
        sampler = Sampler(params)
        return [int(choose_tokens(row[None], [sampler])) for row in logits]

    def in_company() -> list[int]:
        sampler, chosen = Sampler(params), []
        for row in logits:
            others = [Sampler(SamplingParams(temperature=2.0)), Sampler(SamplingParams()), sampler]
            chosen.append(int(choose_tokens(torch.stack([row * 3, -row, row]), others)[2]))
        return chosen

    assert alone() == alone() == in_company()


def test_choices_of_one_request_differ_and_the_first_is_the_single_one() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(temperature=1.0, seed=3)
    first = [int(choose_tokens(logits, [Sampler(params, index)])) for index in range(4)]
    assert len(set(first)) == 4
    assert first[0] == int(choose_tokens(logits, [Sampler(params)]))


def test_sampled_frequencies_follow_the_tempered_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = Sampler(SamplingParams(temperature=2.0, seed=0))
    draws = torch.tensor([int(choose_tokens(logits, [sampler])) for _ in range(4000)])
    found = torch.bincount(draws, minlength=4) / 4000
    assert torch.allclose(found, (logits[0] / 2).softmax(-1), atol=0.03)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=5.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.6), {0}),
        (SamplingParams(temperature=1.0, top_p=0.9), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=1e-9), {0}),
    ],
)
def test_truncation_keeps_only_the_likeliest(params: SamplingParams, allowed: set[int]) -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]])  # probabilities 0.70, 0.26, 0.03, 0.01
    sampler = Sampler(params)
    assert {int(choose_tokens(logits, [sampler])) for _ in range(200)} == allowed


def test_penalties_push_down_what_was_said() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.5]])
    sampler = Sampler(SamplingParams(frequency_penalty=0.3))
    assert [int(choose_tokens(logits, [sampler])) for _ in range(5)] == [0, 1, 0, 1, 2]
    assert logits.tolist() == torch.tensor([[1.0, 0.9, 0.5]]).tolist()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.add([token]) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces) or "�" in text


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked() -> None:
    tokenizer = make_tokenizer()
    kind = type(tokenizer)

    class Loud(kind):  # type: ignore[misc, valid-type]
        def decode(self, *args: object, **kwargs: object) -> str:
            return super().decode(*args, **kwargs).upper()

    tokens = tokenizer("quietly", add_special_tokens=False)["input_ids"]
    tokenizer.__class__ = Loud
    stream = Detokenizer(tokenizer)
    assert stream.add(tokens) + stream.finish() == "QUIETLY"


def test_a_character_of_several_tokens_comes_out_whole() -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer("né 🥖", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 6
    stream = Detokenizer(tokenizer)
    assert [piece for token in tokens if (piece := stream.add([token]))] == ["n", "é", " ", "🥖"]


def test_bytes_that_never_complete_show_at_the_end() -> None:
    tokenizer = make_tokenizer()
    half = tokenizer("🥖", add_special_tokens=False)["input_ids"][:2]
    stream = Detokenizer(tokenizer)
    assert stream.add(half) == ""
    assert stream.finish() == tokenizer.decode(half)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_a_stream_at_the_first_to_complete(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.add(character) for character in text)
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert shown + scanner.finish() == text
        return
    longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
    assert scanner.stopped
    assert shown == text[: ends[0] - longest]
    assert scanner.add("more") == scanner.finish() == ""


def test_a_stop_string_across_tokens_is_cut_and_the_rest_never_shown() -> None:
    tokenizer = make_tokenizer()
    tokens = tokenizer("Mix the flour END and more", add_special_tokens=False)["input_ids"]
    answer = AnswerText(tokenizer, ["r END"])
    shown = ""
    for token in tokens:
        shown += answer.add(token)
        if answer.stopped:
            break
    assert shown == "Mix the flou"


def test_the_audit_chain_holds_and_finds_an_edited_a_missing_and_a_cut_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(4):
        log.record({"what": "activate", "who": "tester", "version": f"v{number}"})
    assert log.verify() == 4
    assert [entry["version"] for entry in log.tail(2)] == ["v2", "v3"]
    whole = log.path.read_text().splitlines(keepends=True)

    log.path.write_text("".join(whole).replace('"v1"', '"v9"'))
    with pytest.raises(StoreError, match="line 2 was edited"):
        log.verify()
    log.path.write_text("".join([whole[0], *whole[2:]]))
    with pytest.raises(StoreError, match=r"line 2 .*removed"):
        log.verify()
    log.path.write_text("".join(whole[:3]))
    with pytest.raises(StoreError, match="lines 4 to 4 are missing"):
        log.verify()
    log.path.write_text("".join(whole))
    assert log.verify() == 4


def test_the_audit_log_goes_on_after_a_restart_and_after_a_torn_line(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").record({"what": "a"})
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"half": ')
    log = AuditLog(tmp_path / "audit.jsonl")
    assert log.record({"what": "b"})["seq"] == 2
    assert log.verify() == 2
    assert all(json.loads(line) for line in log.path.read_text().splitlines())


def test_token_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# operators\nalpha\n\nbeta\n")
    path.chmod(0o600)
    tokens = read_tokens(path, "admin token file")
    assert tokens.matches("alpha")
    assert tokens.matches("beta")
    assert not tokens.matches("")
    assert not tokens.matches("alph")
    assert not tokens.matches("älpha")
    path.chmod(0o622)
    with pytest.raises(UsageError, match="can be written by others"):
        read_tokens(path, "admin token file")
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(UsageError, match="holds no token"):
        read_tokens(path, "admin token file")
    with pytest.raises(UsageError, match="cannot be read"):
        read_tokens(tmp_path / "absent", "admin token file")


def test_configurations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="port is 99999; expected 0 to 65535"):
        ServeConfig(port=99999)
    with pytest.raises(UsageError, match="no engine 'abacus'"):
        ServeConfig(engine="abacus")
    with pytest.raises(UsageError, match="max_choices is 0"):
        Limits(max_choices=0)
    assert ServeConfig(host="127.0.0.5").loopback
    assert not ServeConfig(host="0.0.0.0").loopback
