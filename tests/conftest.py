"""Shared fixtures: folders that hold tiny random models, made once per session, no downloads."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")  # before a module that names one of them as a plugin imports it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for each process: workers, servers and commands run side by side, and OpenMP spins while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = (
    "processes/test_publishing.py",
    "docs/test_tutorial.py",
    "demo/test_browser.py",
    "processes/test_kill_steps.py",
    "hub/test_follow_faults.py",
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
LINES = ["How do I bake bread?", "Mix the flour and the water.", "I cannot help with that.", "What is the capital?"] * 5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few but long tests come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))


def make_tokenizer():  # type: ignore[no-untyped-def]
    """A fast byte-level BPE tokenizer of 300 tokens with bos, eos, pad and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_tiny(folder: Path, model_class: str, config_class: str, seed: int = 0, **changes: object) -> Path:
    """Write a random float32 model of a transformers class, and the tokenizer, to a folder."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, config_class)(**{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).float().eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test gets an empty $NEST_HOME: none sees the user's store or another test's."""
    monkeypatch.setenv("NEST_HOME", str(tmp_path / "nest-home"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 LlamaForCausalLM: d 64, 2 layers, d_ff 96, 300 tokens."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", "LlamaForCausalLM", "LlamaConfig")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float32 Qwen2ForCausalLM of the same size, with tied embeddings."""
    return save_tiny(
        tmp_path_factory.mktemp("models") / "tiny-qwen",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        seed=1,
        tie_word_embeddings=True,
    )
