"""Images in prompts: parts of a prompt file, and a tokenizer that reads them too (content.py says what parts are).

Images are opened when a batch is made, and never kept. The model's own processor decides how images become tensors
(pixels, grids, which tokens they take); nothing here knows models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nest_runtime.errors import DataError, reason_of
from nest_runtime.io import canonical_json
from nest_runtime.prompts.content import images_of

Inputs = dict[str, torch.Tensor]  # what a model takes besides ids and mask
_SHAPE = '{"type": "text", "text": "…"} or {"type": "image", "path": "…"}'


def read_parts(where: str, parts: Sequence[Any], folder: Path) -> list[dict[str, str]]:
    """Content parts of a prompt file, checked; images get their full path and the digest of their bytes.

    Args:
        where: file and line, for errors.
        parts: as in the file.
        folder: what relative paths start from.

    Raises:
        DataError: a part of another form, an image that is not there or is none, or no text at all.
    """
    found: list[dict[str, str]] = []
    for number, part in enumerate(parts, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get({"text": "text", "image": "path"}.get(str(kind), "")) if isinstance(part, dict) else None
        if kind not in ("text", "image") or not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: content part {number} is {str(part)[:80]}", f"write {_SHAPE}")
        if kind == "text":
            found.append({"type": "text", "text": value})
        else:
            path = (folder / Path(value).expanduser()).resolve()
            found.append({"type": "image", "path": str(path), "sha256": _digest(where, path)})
    if not any(part["type"] == "text" for part in found):
        raise DataError(
            f"{where}: a message of images without a text", "add a text part: what is asked about the image"
        )
    return found


def _digest(where: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{where}: the image {path} cannot be read: {reason_of(error)}", "paths start from the prompt file"
        ) from error
    _open(where, path).close()
    return hashlib.sha256(data).hexdigest()


def _open(where: str, path: str | Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{where}: reading images needs pillow, which is not installed", "pip install pillow") from None
    try:
        return Image.open(path)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: {path} is no image that can be read: {reason_of(error)}", "give a PNG or JPEG file"
        ) from error


class ImageReader:
    """A tokenizer that reads prompts with images too; everything else about it is the tokenizer's.

    Args:
        tokenizer: the model's tokenizer.
        processor: the model's processor, or the folder to load it from when the first image comes.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        self._tokenizer, self._processor = tokenizer, processor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_tokenizer", "_processor"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    @property
    def plain(self) -> Any:
        """The tokenizer itself, for libraries that want one of transformers' own."""
        return self._tokenizer

    @cached_property
    def processor(self) -> Any:
        """The processor; raises DataError if it cannot be loaded."""
        if not isinstance(self._processor, str | Path):
            return self._processor
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(self._processor)
        except (ImportError, OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"the processor of {self._processor} cannot be loaded: {type(error).__name__}: {error}".strip(),
                "install what it asks for (pillow, torchvision), or leave prompts with images out",
            ) from error

    @property
    def chat_template(self) -> Any:
        """The tokenizer's template, else the processor's."""
        return self._tokenizer.chat_template or getattr(self.processor, "chat_template", None)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
        """The conversation as the model reads it, with a placeholder for each image."""
        bare = [{**message, "content": _bare(message["content"])} for message in messages]
        return self._tokenizer.apply_chat_template(bare, chat_template=self.chat_template, **kwargs)

    def read(self, messages: Sequence[Mapping[str, Any]], text: str) -> tuple[list[int], Inputs]:
        """Token ids of a rendered conversation with images, placeholders spread out, and the model's other inputs.

        Raises:
            DataError: an image cannot be read, or does not fit its placeholder.
        """
        images = [_open("prompt", part["path"]).convert("RGB") for part in images_of(messages)]
        try:
            found = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # processors raise whatever they find
            raise DataError(
                f"the model's processor refuses a prompt of {len(images)} images: {type(error).__name__}: {error}",
                "check the images, and that the model reads several where there are several",
            ) from error
        values = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
        ids = values.pop("input_ids")[0].tolist()
        values.pop("attention_mask", None)
        return ids, values


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt, by reference: opened again whenever a batch needs them.

    Attributes:
        reader: reads them.
        messages: the prompt.
        text: the prompt, rendered.
        digest: over the images' bytes.
        tokens: how many tokens the prompt has with them.
    """

    reader: ImageReader = field(repr=False, compare=False)
    messages: Sequence[Mapping[str, Any]] = field(repr=False, compare=False)
    text: str = field(repr=False)
    digest: str
    tokens: int

    def load(self) -> Inputs:
        """The model's inputs for them: tensors over the prompt's tokens [1, tokens], and over images [n, …]."""
        return self.reader.read(self.messages, self.text)[1]


def prompt_images(reader: Any, messages: Sequence[Mapping[str, Any]], text: str) -> tuple[list[int], PromptImages]:
    """Ids of a prompt with images, and the images by reference.

    Raises:
        DataError: the model reads text only.
    """
    if not hasattr(reader, "read"):
        raise DataError(
            "a prompt holds an image, and this model reads text only (or was given without its processor)",
            "leave prompts with images out, or use a multimodal model with its processor (LoadedModel.reader)",
        )
    ids, _ = reader.read(messages, text)
    digest = hashlib.sha256(canonical_json([part.get("sha256", part["path"]) for part in images_of(messages)]))
    return ids, PromptImages(reader, messages, text, digest.hexdigest(), len(ids))


def batch_inputs(
    images: Sequence[PromptImages | None], ids: torch.Tensor, starts: Sequence[int], dtype: torch.dtype
) -> Inputs:
    """The further inputs of a padded batch; empty if no prompt in it has images.

    Args:
        images: for each row its images, or None.
        ids: the padded batch (rows, width) int64; results are on its device.
        starts: where each row's prompt begins.
        dtype: the model's; pixels are converted to it.

    Returns:
        Inputs over tokens, padded with 0 to (rows, width); the others concatenated along their first dimension.
    """
    per_token: dict[str, torch.Tensor] = {}
    others: dict[str, list[torch.Tensor]] = {}
    for row, (image, start) in enumerate(zip(images, starts, strict=True)):
        for key, value in image.load().items() if image is not None else ():
            if value.shape[:2] == (1, image.tokens) and value.ndim == 2:  # type: ignore[union-attr]
                whole = per_token.setdefault(key, torch.zeros(ids.shape, dtype=value.dtype))
                whole[row, start : start + value.shape[1]] = value[0]
            else:
                others.setdefault(key, []).append(value)
    joined = per_token | {key: torch.cat(values) for key, values in others.items()}
    return {
        key: value.to(ids.device, dtype) if value.is_floating_point() else value.to(ids.device)
        for key, value in joined.items()
    }


def _bare(content: Any) -> Any:
    """Content as templates know it: image parts without path and digest."""
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else dict(part) for part in content]
