"""Model references: from ``reference``, a folder, a GGUF file or a Hub id to a loaded model and tokenizer.

Only safetensors checkpoints and GGUF files are taken. Nothing here knows of patches.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nest_runtime.errors import ModelError, NestError, UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.io import expand
from nest_runtime.model.fetch import fetch_model, quiet
from nest_runtime.model.gguf.header import find_gguf, read_header

REFERENCE = "reference"
REFERENCE_FOLDER = Path(__file__).parents[1] / "reference" / "model"

_DEVICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = ("float32", "bfloat16", "float16")
_BF16_CPU = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")  # of torch.cpu.get_capabilities()
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass
class LoadedModel:
    """A model in eval mode, its tokenizer, and where they came from.

    ``source`` is a folder, or a GGUF file. ``hash`` is its hash, computed when first asked for: it names the
    checkpoint even if the live model was loaded in another dtype.
    """

    model: Any
    tokenizer: Any
    name: str
    source: Path | None
    device: str = field(default="cpu")

    @cached_property
    def hash(self) -> str:
        """The model hash of what was loaded, ``sha256:…``; computed once."""
        from nest_runtime.model.bases import remember_base
        from nest_runtime.model.fingerprint import model_hash

        if self.source is None:
            return model_hash(self.model)
        found = model_hash(self.source)
        if self.name != REFERENCE:  # a patch made for this model finds it again
            remember_base(found, self.name, self.source)
        return found

    @cached_property
    def reader(self) -> Any:
        """The tokenizer; for a model that reads images one that reads prompts with images too."""
        source = self.source
        if source is None or not any((source / name).is_file() for name in _PROCESSOR_FILES):
            return self.tokenizer
        from nest_runtime.prompts.images import ImageReader

        return ImageReader(self.tokenizer, source)


def resolve_model(ref: str | Path, *, trust_remote_code: bool = False, config_only: bool = False) -> tuple[str, Path]:
    """A model reference's name and its folder or GGUF file; a Hub id is downloaded once, then found in the Hub's cache.

    A GGUF file is named after itself, without its path, in a folder too.

    Args:
        ref: ``reference``, a folder, a GGUF file, or a Hub id ``org/name[@revision]``. A folder wins over an id of that
            name.
        trust_remote_code: fetch the code that comes with a Hub model too.
        config_only: fetch nothing but the configuration of a Hub model with safetensors.

    Raises:
        ModelError: there is no such model, or it cannot be fetched or used.
    """
    ref = str(ref)
    if ref == REFERENCE:
        if not (REFERENCE_FOLDER / "config.json").is_file():
            raise ModelError(
                f"the reference model is missing from this installation ({REFERENCE_FOLDER})",
                "build it with `nest-runtime reference build`, or reinstall nest-runtime",
            )
        return REFERENCE, REFERENCE_FOLDER
    folder = expand(ref)
    if folder.exists() and (gguf := find_gguf(folder)) is not None:
        return gguf.name, gguf.absolute()
    if folder.is_dir():
        _check_folder(folder)
        return _folder_name(folder), folder.resolve()
    if not _HUB_ID.fullmatch(ref) or ref.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no model {ref!r}: not a folder, not a file, and not a Hub id",
            f"{did_you_mean(ref, _beside(folder))}use {REFERENCE!r}, a folder with config.json, a GGUF file, "
            "or org/name[@revision]",
        )
    found = fetch_model(ref, code=trust_remote_code, config_only=config_only)
    if found.is_dir():
        _check_folder(found)
    return ref.partition("@")[0], found


def known_base(model_hash: str) -> str | None:
    """The model reference that a hash was loaded from, if it still has that hash; else None."""
    from nest_runtime.model.bases import noted_base
    from nest_runtime.model.fingerprint import hash_report

    place = noted_base(model_hash)
    if place is None:
        return None
    try:
        same = hash_report(resolve_model(place)[1])["hash"] == model_hash
    except (NestError, OSError):  # it is gone, or no model any more
        return None
    return place if same else None


def _folder_name(folder: Path) -> str:
    """What a folder is called: as it was typed, a symbolic link too; a snapshot of the Hub's as its repository."""
    typed = folder if folder.name not in ("", "..") else folder.resolve()
    repo = typed.parent.parent.name
    if typed.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return typed.name


def _beside(folder: Path) -> list[str]:
    """What a mistyped model may have meant: the built-in one, or a model's folder beside the one named."""
    parent = folder.parent
    lead = "" if parent == Path() and not str(folder).startswith(".") else f"{parent}/"
    try:
        models = sorted(path.parent.name for path in parent.glob("*/config.json"))
        models += sorted(path.name for path in parent.glob("*.gguf"))
    except OSError:  # a folder that may not be read has no suggestions
        models = []
    return [REFERENCE, *(f"{lead}{name}" for name in models)]


def load_model(
    ref: str | Path = REFERENCE, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model reference for inference.

    Args:
        ref: ``reference``, a folder, a GGUF file, or a Hub id ``org/name[@revision]``.
        device: ``auto`` takes cuda, then mps, then cpu.
        dtype: ``auto`` keeps the checkpoint's, and for a GGUF file takes bfloat16 where the device computes in it,
            else float32; or float32, bfloat16, float16.
        trust_remote_code: run code that comes with the checkpoint. Never on by itself.

    Returns:
        The model in eval mode, its tokenizer padding on the left with a pad token set.

    Raises:
        ModelError: the model cannot be found or loaded, or the device is not on this machine.
        UsageError: there is no such device or dtype.
    """
    place, wanted = pick_device(device), _pick_dtype(dtype)
    name, source = resolve_model(ref, trust_remote_code=trust_remote_code)
    if source.is_file():
        return _load_gguf(source, name, place, gguf_dtype(place) if wanted == "auto" else wanted)
    return _load_folder(source, name, place, wanted, trust_remote_code)


def gguf_dtype(device: str) -> Any:
    """The dtype for a GGUF file's numbers on a device: bfloat16 if it computes in it natively, else float32.

    A CPU without such instructions converts bfloat16 at every step, and is slower than in float32.
    """
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device != "cpu":
        return torch.float32
    asked = getattr(torch.cpu, "get_capabilities", None)
    if asked is None:  # torch before 2.10 tells of one of them alone
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    capabilities = asked()
    return torch.bfloat16 if any(capabilities.get(key) for key in _BF16_CPU) else torch.float32


def _load_gguf(path: Path, name: str, device: str, dtype: Any) -> LoadedModel:
    import torch

    from nest_runtime.model.gguf.ends import end_tokens
    from nest_runtime.model.gguf.model import load_tokenizer, load_weights

    header = read_header(path)
    with quiet():
        tokenizer = prepare_tokenizer(load_tokenizer(header))
        model = load_weights(header, dtype)
    torch.nn.Module.to(model, device)
    model.eval()
    settings: Any = model.generation_config
    settings.eos_token_id = end_tokens(header, tokenizer) or None
    settings.pad_token_id = tokenizer.pad_token_id
    if not tokenizer.chat_template:
        warnings.warn(f"{name} holds no chat template: messages are joined as plain text", stacklevel=3)
    return LoadedModel(model, tokenizer, name, path, device)


def _load_folder(folder: Path, name: str, place: str, wanted: Any, trust_remote_code: bool) -> LoadedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from nest_runtime.model.weights import weight_files

    loader = _auto_class(folder)
    weight_files(folder)  # says what is missing better than the loader does
    try:
        with quiet():
            model, info = loader.from_pretrained(
                folder,
                dtype=wanted,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{name} cannot be loaded from {folder}: {type(error).__name__}: {error}".splitlines()[0],
            "check that the folder holds a complete safetensors checkpoint of a causal LM with its tokenizer",
        ) from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{name} lacks {len(missing)} of its tensors: {', '.join(missing[:3])}", "fetch the checkpoint again"
        )
    torch.nn.Module.to(model, place)
    model.eval()
    prepare_tokenizer(tokenizer)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
        model.generation_config.pad_token_id = pad if pad < rows else 0  # padding is masked, and computed all the same
    return LoadedModel(model, tokenizer, name, folder, place)


def skeleton(source: str | Path) -> Any:
    """The model of a folder or GGUF file on the meta device: its modules and shapes, none of its numbers.

    Raises:
        ModelError: the configuration is of no model that transformers knows.
    """
    import torch
    from transformers import AutoConfig

    folder = Path(source)
    if (gguf := find_gguf(folder)) is not None:
        from nest_runtime.model.gguf.model import skeleton_of

        with quiet():
            return skeleton_of(read_header(gguf))
    _check_folder(folder)
    try:
        with quiet(), torch.device("meta"):
            return _auto_class(folder).from_config(AutoConfig.from_pretrained(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"no model can be made from {folder / 'config.json'}: {type(error).__name__}: {error}".splitlines()[0],
            "name the folder of a causal LM that this release of transformers knows",
        ) from error


def _auto_class(folder: Path) -> Any:
    """The class that loads a folder's model: for causal LMs, or for those that read images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    text, images = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if kind in images and kind not in text else AutoModelForCausalLM


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Make a tokenizer pad on the left, with the end-of-sequence token if it has no pad token; returns it."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has neither a pad nor an eos token", "set tokenizer.pad_token first")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device(device: str = "auto") -> str:
    """Resolve a device: ``auto`` is cuda, mps or cpu, whichever is there first; a named device must exist.

    Raises:
        UsageError: no device is called so.
        ModelError: it is not on this machine.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.empty(0, device=device).is_meta:
            raise NotImplementedError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["unavailable"])[0]
        known = device.partition(":")[0] in _DEVICES
        near = "" if known else did_you_mean(device, _DEVICES)
        raise (ModelError if known else UsageError)(
            f"device {device!r} cannot be used: {reason}", f"{near}use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return device


def _pick_dtype(dtype: str) -> Any:
    import torch

    if dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise UsageError(
            f"dtype {dtype!r} is not supported; expected one of auto, {', '.join(_DTYPES)}",
            f"{did_you_mean(dtype, ('auto', *_DTYPES))}auto keeps the checkpoint's",
        )
    return getattr(torch, dtype)


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():  # transformers would put it on, unseen by the hash
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json); expected a whole model", "merge the adapter first"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} has no config.json", "name a folder written by save_pretrained (config.json, *.safetensors)"
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config} is not JSON: {error}", "save the model again with save_pretrained") from error
