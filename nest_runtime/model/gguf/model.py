"""From a GGUF file to a model: configuration, dequantized weights, and a tokenizer with all its end tokens.

transformers says what a configuration key or tensor of llama.cpp is in its own terms; the file is read here, since its
reader takes a minute for a vocabulary of 150,000. Of transformers 5.23 this uses ``TENSOR_PROCESSORS`` and
``TensorProcessor``, nowhere else. Weights are dequantized tensor by tensor with the
package gguf and held in one dtype: what the model computes with, and what training changes, are plain matrices.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nest_runtime.errors import ModelError
from nest_runtime.model.gguf.header import MAGIC, Header, Tensor
from nest_runtime.model.projection import Projection

_VOCABULARY = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
_ROPE = "rope_freqs.weight"
_OTHER = "use the model's safetensors checkpoint, or another GGUF file of it"


def load_weights(header: Header, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF file on the CPU, dequantized to one dtype.

    Raises:
        ModelError: transformers does not know the architecture, or not all of the file's tensors; or a tensor's type
            cannot be dequantized.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    empty = skeleton_of(header)
    config: Any = empty.config
    config.dtype = dtype
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    names = _names(header, empty, processor)
    stored: dict[str, Any] = {"tensors": {}}  # where processors put what they make of several tensors
    state, unread = {}, []
    for tensor in header.tensors.values():
        made = processor.process(
            weights=dequantized(header.path, tensor),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=stored,
        )
        if made.name in names:
            state[names[made.name]] = torch.tensor(made.weights).to(dtype)
        elif made.name is not None:
            unread.append(made.name)
    state.update({name: value.to(dtype) for name, value in stored["tensors"].items()})
    if strange := [name for name in unread if name != _ROPE]:
        raise ModelError(
            f"{header.path} holds {len(strange)} tensors that no part of {type(empty).__name__} reads: "
            f"{', '.join(strange[:3])}",
            _OTHER,
        )
    model = _filled(header, empty, state, dtype)
    if unread:
        _divide_frequencies(model, torch.from_numpy(dequantized(header.path, header.tensors[_ROPE]).copy()))
    return model


def skeleton_of(header: Header) -> nn.Module:
    """The model of a GGUF file on the meta device: its modules and shapes, none of its numbers.

    Raises:
        ModelError: transformers does not know the architecture, or not how this file scales positions.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(header)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).eval()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        raise _unknown(header, error) from error


def config_of(header: Header) -> Any:
    """The configuration that transformers makes of a GGUF file's metadata.

    Raises:
        ModelError: transformers does not know the architecture, or not how this file scales positions.
    """
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    scaling = header.get(f"{header.architecture}.rope.scaling.type")
    if scaling not in (None, "none", "") and header.architecture != "gpt-oss":
        raise ModelError(
            f"{header.path} scales its positions ({scaling}), which transformers does not read from GGUF files", _OTHER
        )
    with _metadata_file(header, without=_VOCABULARY) as file:
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, TypeError, IndexError, OSError, ImportError, AttributeError) as error:
            known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
            raise _unknown(header, error, f"it reads {', '.join(known)}") from error
    config.name_or_path = str(header.path)
    config.vocab_size = _rows(header)  # the vocabulary may be shorter than its table
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not _is_row(getattr(config, key, None), config.vocab_size):
            setattr(config, key, None)
    return config


def load_tokenizer(header: Header) -> Any:
    """The tokenizer of a GGUF file, with its chat template, and a pad token that the embedding has a row for.

    Raises:
        ModelError: transformers knows no such tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    with _metadata_file(header) as file:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, TypeError, IndexError, OSError, ImportError, AttributeError) as error:
            kind = header.get("tokenizer.ggml.model")
            raise ModelError(
                f"{header.path} has a tokenizer ({kind}) that transformers cannot read: {type(error).__name__}: "
                f"{error}".splitlines()[0],
                _OTHER,
            ) from error
    tokenizer.name_or_path = str(header.path)
    _split_digits(header, tokenizer)
    rows = _rows(header)
    _drop_strangers(tokenizer, header.count("tokenizer.ggml.tokens"))
    if not _is_row(tokenizer.pad_token_id, rows) and _is_row(tokenizer.eos_token_id, rows):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def dequantized(path: Path, tensor: Tensor, rows: np.ndarray | None = None) -> np.ndarray:
    """A tensor's numbers in float32, in the order of PyTorch; or those of some rows [n, columns].

    Rows are counted through all leading dimensions.

    Raises:
        ModelError: the package gguf cannot dequantize its type.
    """
    import gguf

    *leading, columns = tensor.shape
    stored = np.memmap(path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.nbytes,))
    blocks = stored.reshape(*leading, tensor.nbytes // max(int(np.prod(leading)), 1))
    if rows is not None:
        blocks = np.ascontiguousarray(blocks.reshape(-1, blocks.shape[-1])[rows])
    try:
        made = gguf.dequantize(blocks, gguf.GGMLQuantizationType(tensor.type))
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path}: tensor {tensor.name} is of GGML type {tensor.type}, which cannot be dequantized here", _OTHER
        ) from error
    return np.asarray(made, dtype=np.float32).reshape(*blocks.shape[:-1], columns)


class GgufRows:
    """The rows of a model's FFN projections as its GGUF file holds them.

    Args:
        header: the file's.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._table = _name_table(header)

    def read(self, projection: Projection, neurons: torch.Tensor) -> torch.Tensor:
        """The rows of some neurons, [n, d_in] in float32.

        Raises:
            ModelError: the file holds no such rows.
        """
        tensor, rows = self._stored(projection, neurons)
        if tensor is None or tensor.shape[-1] != projection.d_in or int(rows.max(initial=0)) >= _rows_of(tensor):
            raise ModelError(f"{self.header.path} holds no weight for {projection.name}", "use the patch's own base")
        return torch.from_numpy(dequantized(self.header.path, tensor, rows))

    def _stored(self, projection: Projection, neurons: torch.Tensor) -> tuple[Tensor | None, np.ndarray]:
        if projection.experts:  # one tensor for gate and one for up, expert by expert
            name = f"blk.{projection.layer}.ffn_{projection.kind}_exps.weight"
            return self.header.tensors.get(name), neurons.long().numpy()
        found = self._table.get_name(projection.tensor, try_suffixes=(".weight",))
        return self.header.tensors.get(found or ""), projection.rows(neurons).numpy()


def _names(header: Header, empty: nn.Module, processor: Any) -> dict[str, str]:
    """llama.cpp's names of tensors → the model's.

    A name is looked up as it is first, then without the model's outer modules: some converters name the inner model.
    """
    table, names = _name_table(header), {}
    for depth in range(3):
        for whole in empty.state_dict():
            outer, inner = whole.split(".")[:depth], whole.split(".")[depth:]
            known = processor.preprocess_name(".".join(inner))
            stem, dot, last = known.rpartition(".")
            stem, suffix = (stem, dot + last) if last in ("weight", "bias") else (known, "")
            prefix = "".join(f"{part}." for part in outer)
            found = table.get_name(stem) if stem else None
            made: dict[str, str] = {}
            if found is None:
                processor.perform_fallback_tensor_mapping(made, suffix, prefix, known)
            else:
                made[found + suffix] = prefix + known
            names.update({key: value for key, value in made.items() if key not in names})
    return names


def _name_table(header: Header) -> Any:
    """What llama.cpp calls tensors of this architecture."""
    from gguf import MODEL_ARCH_NAMES

    known = next((number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
    if known is None:
        raise ModelError(
            f"{header.path} is of architecture {header.architecture}, which the installed package gguf does not know",
            "pip install --upgrade gguf",
        )
    return _names_of(int(known), int(header.get(f"{header.architecture}.block_count") or 0))


@lru_cache(maxsize=2)
def _names_of(architecture: int, blocks: int) -> Any:
    """The package's table, which takes ten milliseconds to make; nobody writes to it."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH(architecture), blocks)


def _rows_of(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape[:-1]))


def _filled(header: Header, empty: nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """The model with its weights by name, as [rows, columns] in ``dtype``.

    transformers makes its buffers and ties weights.
    """
    model, info = type(empty).from_pretrained(  # type: ignore[attr-defined]
        None, config=empty.config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]) + sorted(str(item) for item in info["mismatched_keys"]):
        raise ModelError(
            f"{header.path} lacks {len(missing)} of the tensors of {type(empty).__name__}, or has them in another "
            f"shape: {', '.join(missing[:3])}",
            _OTHER,
        )
    model.config.name_or_path = str(header.path)
    return model


def _divide_frequencies(model: nn.Module, factors: torch.Tensor) -> None:
    """Llama 3's scaled positions: the file holds a divisor [head_dim / 2] for each rotary frequency."""
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor):
                frequencies.copy_(frequencies / factors.to(frequencies.dtype))


def _split_digits(header: Header, tokenizer: Any) -> None:
    """Split digits one by one, as llama.cpp does for these vocabularies; transformers 5.23 has other names for them."""
    from tokenizers import Regex, pre_tokenizers

    if header.get("tokenizer.ggml.pre") in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _drop_strangers(tokenizer: Any, count: int) -> None:
    """Remove added tokens beyond the file's: classes of transformers bring their own, which have no embedding row."""
    if len(tokenizer) <= count:
        return
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _rows(header: Header) -> int:
    """How many tokens the embedding has rows for."""
    embedding = header.tensors.get("token_embd.weight")
    return header.count("tokenizer.ggml.tokens") if embedding is None else embedding.shape[0]


def _is_row(token: Any, rows: int) -> bool:
    return isinstance(token, int) and 0 <= token < rows


def _unknown(header: Header, error: Exception, known: str = "") -> ModelError:
    reason = (str(error).splitlines() or [""])[0]
    return ModelError(
        f"{header.path} is of architecture {header.architecture}, which transformers cannot make a model of from a "
        f"GGUF file: {type(error).__name__}: {reason}",
        f"{known}; {_OTHER}" if known else _OTHER,
    )


@contextmanager
def _metadata_file(header: Header, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """A small GGUF file with the header's metadata and the names of its tensors, alone in a folder for a while.

    In the model's own folder transformers would take whatever tokenizer and settings lie beside the file.
    """
    kept = [key for key in header.values if key not in without]
    # Without the vocabulary its size has to be said: transformers counts tokens where no key tells.
    sized = f"{header.architecture}.vocab_size"
    more = [_text(sized) + struct.pack("<II", 4, _rows(header))] if without and sized not in kept else []
    with tempfile.TemporaryDirectory(prefix="nest-gguf-") as folder:
        file = Path(folder) / "metadata.gguf"
        with file.open("wb") as out:
            out.write(MAGIC + struct.pack("<IQQ", 3, len(header.tensors), len(kept) + len(more)))
            out.writelines(more)
            for key in kept:
                out.write(_text(key) + struct.pack("<I", header.values[key].type) + header.value_bytes(key))
            for name in header.tensors:  # one number each, all at the same place
                out.write(_text(name) + struct.pack("<IQIQ", 1, 1, 0, 0))
            out.write(bytes(header.alignment + 4 + -out.tell() % header.alignment))
        yield file


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()
