"""Model references: what they resolve to, how they load, and what is said when they do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

from nest_runtime.errors import ModelError, UsageError
from nest_runtime.model import load as models
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.model.load import load_model, pick_device, resolve_model


def test_folder(tiny_llama: Path) -> None:
    assert resolve_model(str(tiny_llama)) == ("tiny-llama", tiny_llama)
    loaded = load_model(str(tiny_llama), device="cpu")
    assert (loaded.name, loaded.source, loaded.device) == ("tiny-llama", tiny_llama, "cpu")
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.hash == model_hash(tiny_llama)


def test_generate_and_chat_template(tiny_qwen: Path) -> None:
    loaded = load_model(tiny_qwen, device="cpu")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello é"}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>Be kind.</s><|user|>Hello é</s><|assistant|>"
    batch = loaded.tokenizer([text, "<s>"], return_tensors="pt", padding=True, add_special_tokens=False)
    assert int(batch["attention_mask"][1, 0]) == 0
    output = loaded.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= batch["input_ids"].shape[1] + 3


def test_another_dtype_keeps_the_hash_of_the_checkpoint(tiny_llama: Path) -> None:
    loaded = load_model(tiny_llama, device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.hash == model_hash(tiny_llama)


def test_pad_token_is_set_where_missing(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-pad"
    shutil.copytree(tiny_llama, folder)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("pad_token", None)
        content.pop("pad_token_id", None)
        (folder / name).write_text(json.dumps(content))
    loaded = load_model(folder, device="cpu")
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id


def test_reference_is_a_clear_error_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "REFERENCE_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="reference build"):
        load_model()
    shutil.copy(__file__, tmp_path / "x")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("reference") == ("reference", tmp_path)


@pytest.mark.parametrize("ref", ["nope", "/no/such/folder", "./a/b", "a/b/c", "", "a b/c", "org/name@"])
def test_what_is_no_model(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve_model(ref)
    assert caught.value.hint


def test_files_and_folders_that_hold_no_model(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(__file__)
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)
    shutil.copy(tiny_llama / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load_model(tmp_path)


def test_missing_and_damaged_tensors_are_errors_not_random_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, device="cpu")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, device="cpu")


def test_dtypes_and_devices() -> None:
    with pytest.raises(UsageError, match="'int3' is not supported; expected one of auto, float32"):
        load_model("reference", dtype="int3")
    with pytest.raises(UsageError, match="'nonsense' cannot be used"):
        pick_device("nonsense")
    with pytest.raises(UsageError, match="holds no numbers"):
        pick_device("meta")
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in {"cuda", "mps", "cpu"}
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="'cuda' cannot be used"):
            pick_device("cuda")


# The Hub, without a network: what is asked of it, and how its answers are told apart.


def test_hub_download_asks_for_no_code_and_no_pickles(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, object]] = []

    def download(repo: str, **kwargs: object) -> str:
        asked.append({"repo": repo, **kwargs})
        return str(tiny_llama)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name@refs/pr/1") == ("org/name", tiny_llama)
    assert (asked[0]["repo"], asked[0]["revision"]) == ("org/name", "refs/pr/1")
    patterns = asked[0]["allow_patterns"]
    assert isinstance(patterns, list)
    assert "*.safetensors" in patterns
    assert not {"*.bin", "*.py", "*.pt"} & set(patterns)
    resolve_model("org/name", trust_remote_code=True)
    assert asked[1]["revision"] is None
    assert "*.py" in asked[1]["allow_patterns"]  # type: ignore[operator]


def test_a_folder_wins_over_a_hub_id(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_llama, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == ("name", (tmp_path / "org" / "name").resolve())


class Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 404
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "could not be reached"),
        (RevisionNotFoundError("no", response=Response()), "no revision 'v9'"),  # type: ignore[arg-type]
        (OSError("disk full"), "disk full"),
    ],
)
def test_hub_errors(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        resolve_model("org/name@v9")


def test_hub_ids_that_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="is no Hub id"):
        resolve_model("a--b/c")
    with pytest.raises(ModelError, match="could not be reached"):
        resolve_model("org/never-downloaded")  # the tests run offline


def test_progress_bars_are_as_they_were(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    load_model(tiny_llama, device="cpu")
    assert logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""
    if not before:
        logging.disable_progress_bar()
