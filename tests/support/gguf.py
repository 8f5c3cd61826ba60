"""Writes GGUF files: tiny models as llama.cpp's converter would (names, permuted heads, tokenizer, chat template), and
copies of files in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from nest_runtime.model.gguf.header import read_header
from nest_runtime.model.gguf.model import dequantized

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2"}
CONTROL, NORMAL = 3, 1


def write_gguf(
    folder: Path,
    path: Path,
    *,
    quantized: str = "F32",
    order: Callable[[list[str]], list[str]] = list,
    numbers: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    template: str | None = "own",
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
    architecture: str | None = None,
    pad: int | None = None,
) -> Path:
    """Write a Hugging Face folder of a Llama or Qwen2 as a GGUF file.

    Args:
        folder: the model.
        path: the file to write.
        quantized: GGML's name of the type of all matrices; other tensors are float32.
        order: puts tensors in another order.
        numbers: changes tensors, by their GGUF name.
        template: the chat template; ``own`` is the tokenizer's, None writes none.
        extra: writes more metadata.
        architecture: written instead of the model's.
        pad: the pad token's id, instead of the model's.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    arch = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture or arch)
    _write_settings(writer, model.config)
    _write_tokenizer(writer, tokenizer, model.config, template, model.config.pad_token_id if pad is None else pad)
    if extra is not None:
        extra(writer)
    tensors = _tensors(model, arch)
    kind = gguf.GGMLQuantizationType[quantized]
    for name in order(list(tensors)):
        values = (numbers or {}).get(name, lambda given: given)(tensors[name])
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized_copy(path: Path, copy: Path) -> Path:
    """Write a GGUF model again with all of its numbers in float32, as our runtime reads them, and the same metadata."""
    header = read_header(path)
    writer = gguf.GGUFWriter(copy, header.architecture)
    for field in gguf.GGUFReader(path).fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in header.tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), 4 * int(np.prod(tensor.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in header.tensors.values():  # one at a time in memory
        writer.write_tensor_data(dequantized(path, tensor))
    writer.close()
    return copy


def _write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: Any, config: Any, template: str | None, pad: int | None
) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    specials = set(tokenizer.all_special_tokens) | {str(t) for t in tokenizer.added_tokens_decoder.values()}
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in specials else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if pad is not None:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(tokenizer.chat_template if template == "own" else template)


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def _tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    table = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.detach().numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        tensors[found] = np.ascontiguousarray(values)
    return tensors
