"""Prompt files: every form that the README names, and every way one can be wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from nest_runtime.errors import DataError
from nest_runtime.prompts import examples as data
from nest_runtime.prompts.examples import encode, examples_digest, load_examples, make_examples, pick_split, render

GIVEN = Path(os.environ.get("NEST_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: object, *words: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_examples(str(path))
    for word in words:
        assert word in f"{caught.value.message} | {caught.value.hint}"
    return caught.value


def test_jsonl_prompts_responses_and_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hello?", "response": "Hi.", "category": "small talk", "id": "a1", "score": 3},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]},
        {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]},
    ]
    path = write(tmp_path, "x.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    first, second, third = load_examples(path)
    assert (first.prompt, first.response, first.category, first.id) == ("Hello?", "Hi.", "small talk", "a1")
    assert dict(first.meta) == {"score": 3}
    assert [m["role"] for m in second.messages] == ["system", "user"]
    assert second.response is None
    assert second.id == "x.jsonl:2"
    assert third.response == "Hi."
    assert third.messages == ({"role": "user", "content": "Hello?"},)


@pytest.mark.parametrize("header", ["prompt", "goal", "Behavior", "GOAL", " Prompt "])
def test_csv_columns_any_case(tmp_path: Path, header: str) -> None:
    path = write(tmp_path, "x.csv", f'{header},note\n"two\nlines, and a comma",n\n\nplain,\n')
    assert [example.prompt for example in load_examples(path)] == ["two\nlines, and a comma", "plain"]


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_examples(write(tmp_path, "x.csv", b"\xef\xbb\xbfprompt\nHello\n"))[0].prompt == "Hello"


def test_txt_and_json_list(tmp_path: Path) -> None:
    assert [e.prompt for e in load_examples(write(tmp_path, "x.txt", "one\n\n two \r\n"))] == ["one", "two"]
    path = write(tmp_path, "x.json", '["one", {"text": "two", "label": "harmful"}]')
    assert [e.prompt for e in load_examples(path)] == ["one", "two"]
    assert [e.prompt for e in load_examples(f"{path}#label=harmful")] == ["two"]
    refused(f"{path}#label=none", "no row has label = 'none'", "harmful")


def test_harmbench_context_comes_before_the_behavior(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "Behavior,ContextString\nSum it up,A long text\nOther,\n")
    assert [e.prompt for e in load_examples(path)] == ["A long text\n\n---\n\nSum it up", "Other"]


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "x.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(path, "needs pyarrow", "pip install pyarrow")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', ["a.jsonl:2", "broken JSON"]),
        ("a.jsonl", '{"prompt": "x"}\n{"question_text": "y"}\n', ["a.jsonl:2", "no 'prompt'", "'question_text'"]),
        ("a.jsonl", '{"prompt": 3}\n', ["a.jsonl:1", "'prompt' is int", "expected a string"]),
        ("a.jsonl", '{"prompt": "  "}\n', ["a.jsonl:1", "is empty"]),
        ("a.jsonl", '{"prompt": "x", "response": 1}\n', ["a.jsonl:1", "'response' is int"]),
        ("a.jsonl", "[1]\n", ["a.jsonl:1", "a JSON list"]),
        ("a.jsonl", '{"messages": []}\n', ["a.jsonl:1", "'messages'"]),
        ("a.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}\n', ["role 'robot'", "system, user, assistant"]),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', ["message 1", "content"]),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', ["no user message"]),
        ("a.jsonl", "\n\n", ["no prompts"]),
        ("a.json", "{}", ["a JSON object", "expected a list"]),
        ("a.json", '[{"prompt": "x"},\n oops]', ["a.json:2", "broken JSON"]),
        ("a.csv", "name,words\na,b\n", ["a.csv:1", "'name', 'words'", "'prompt', 'goal' or 'Behavior'"]),
        ("a.csv", "prompt,b\nx,y,z\n", ["a.csv:2", "3 cells", "header has 2"]),
        ("a.csv", 'prompt\n"x\n', ["a.csv", "broken CSV"]),
        ("a.csv", "prompt,b\nfine,y\n,y\n", ["a.csv:3", "empty"]),
        ("a.csv", "prompt\n", ["no prompts"]),
        ("a.csv", 'prompt\nfine\n""\nfine\n', ["a.csv:3", "empty"]),
        ("a.txt", "", ["no prompts"]),
        ("a.txt", b"fine\nbad \xff\n", ["a.txt:2", "0xff", "UTF-8"]),
        ("a.txt", "x".encode("utf-16"), ["a.txt:1", "UTF-16"]),
        ("a.xlsx", "x", ["unknown kind", "'.xlsx'", ".jsonl"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: str | bytes, words: list[str]) -> None:
    refused(write(tmp_path, name, content), *words)


def test_missing_files_suggest_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "harmful.jsonl", "{}")
    refused(tmp_path / "harmfull.jsonl", "no such prompt file", "did you mean", "harmful.jsonl")
    refused(Path("bordeline"), "no such prompt file", "did you mean borderline?", "everyday")
    refused(tmp_path / "nowhere" / "x.jsonl", "does not exist either")
    refused(tmp_path, "is a folder")
    refused(Path("/dev/null"), "device or a pipe")


def test_dataset_references() -> None:
    refused("hf://datasets/only-one-part", "no dataset reference", "hf://datasets/org/name")
    names = ["README.md", "data/test-00000.parquet", "data/train.csv", "data/train.jsonl"]
    assert pick_split("r", names, None) == "data/train.jsonl"
    assert pick_split("r", names, "test") == "data/test-00000.parquet"
    assert pick_split("r", ["a.csv"], None) == "a.csv"
    with pytest.raises(DataError, match="no data file of split 'dev'"):
        pick_split("r", names, "dev")


def test_a_dataset_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = write(tmp_path, "train.jsonl", '{"prompt": "x"}\n')
    asked = []

    def download(repo: str, name: str, **keywords: object) -> str:
        asked.append((repo, name, keywords["revision"]))
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: ["train.jsonl"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_examples("hf://datasets/org/name@main:train")[0].prompt == "x"
    assert asked == [("org/name", "train.jsonl", "main")]

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    refused("hf://datasets/org/name", "cannot read dataset org/name", "no route")


def test_digest_covers_what_is_learned_and_nothing_else() -> None:
    one = make_examples([{"prompt": "a", "id": "1"}])
    assert examples_digest(one) == examples_digest(make_examples([{"prompt": "a", "id": "2", "category": "c"}]))
    assert examples_digest(one) != examples_digest(make_examples([{"prompt": "a", "response": "b"}]))
    assert examples_digest(one).startswith("sha256:")


def test_render_and_encode(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    messages = [{"role": "user", "content": "Hello?"}]
    text = render(tokenizer, messages)
    assert text == "<s><|user|>Hello?</s><|assistant|>"
    ids = encode(tokenizer, messages)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids) == text
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match="no such role"):
        render(tokenizer, messages)
    tokenizer.chat_template = None
    assert render(tokenizer, messages) == "Hello?"


@pytest.mark.skipif(not GIVEN.is_dir(), reason="the public prompt sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("advbench/advbench.csv", 520),
        ("harmbench/harmbench_behaviors_text_test.csv", 320),
        ("harmbench/harmbench_behaviors_text_val.csv", 80),
        ("jailbreakbench/harmful_and_benign/jailbreakbench.json", 200),
        ("jailbreakbench/harmful_and_benign/jailbreakbench.json#label=harmful", 100),
        ("xstest/xstest_prompts.csv", 450),
        ("xstest/xstest_prompts.csv#label=unsafe", 200),
        ("gsm8k/test_first200.jsonl", 200),
        ("self_instruct/seed_tasks.jsonl", 175),
        ("self_instruct/user_oriented_instructions.jsonl", 252),
    ],
)
def test_public_prompt_sets_read(name: str, count: int) -> None:
    examples = load_examples(GIVEN / name)
    assert len(examples) == count
    assert all(example.prompt.strip() for example in examples)


def test_importing_data_does_not_load_transformers() -> None:
    import subprocess

    code = f"import sys, {data.__name__}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
