"""The command export: a patch for other tools. An adapter for PEFT, vLLM or llama.cpp, or a merged checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.commands.patches import PatchArgument
from nest_runtime.cli.common import base_hash_of, examples, writable_folder
from nest_runtime.cli.output import JsonOption, Output, size
from nest_runtime.errors import BaseMismatch, UsageError
from nest_runtime.io import expand

if TYPE_CHECKING:
    from nest_runtime.export.measure import Measured, Reference
    from nest_runtime.patch.patch import Patch


class ExportForm(StrEnum):
    """What to write."""

    peft = "peft"
    merged = "merged"
    vllm = "vllm"
    gguf = "gguf"


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "export",
        rich_help_panel="Ship patches",
        epilog=examples(
            "nest-runtime export v3 --to peft --out v3-adapter",
            "nest-runtime export my.safetensors --to merged --model ./mine --out ./safe",
        ),
    )(export)


def export(
    ctx: typer.Context,
    patch: Annotated[str, PatchArgument],
    form: Annotated[
        ExportForm, typer.Option("--to", help="An adapter for PEFT, vLLM or llama.cpp, or a whole checkpoint.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            autocompletion=complete.models,
            help="The patch's base; the reference model where it is that one's.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the base with the export, and compare its logits.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a patch in a form that other tools read.

    An adapter computes exactly what the patch does; `merged` is the base's checkpoint with the patched rows changed.
    What was written is loaded again and compared with the patch on the model itself.
    """
    out = Output.of(ctx, as_json)
    from nest_runtime.export.folder import check_target
    from nest_runtime.resolve import load_patch

    loaded = load_patch(patch, model_hash=base_hash_of(model))
    check_target(expand(out_folder).absolute(), overwrite)
    writable_folder(expand(out_folder).absolute().parent)
    job = _Job(out, loaded, _base_of(loaded, model), form, out_folder, overwrite, check)
    document = job.run()
    out.result(document, lambda: _render(out, document))


@dataclass
class _Job:
    """One export and its check."""

    out: Output
    patch: Patch
    base: Path | None
    form: ExportForm
    folder: Path
    overwrite: bool
    check: bool
    measured: Measured | None = None

    def run(self) -> dict[str, Any]:
        with self.out.bars() as bars:
            made = self._merged(bars) if self.form is ExportForm.merged else self._adapter()
        files = list(made.files)
        figures = asdict(self.measured) if self.measured else {"max_abs_error": None, "max_abs_change": None}
        facts = {key: getattr(made, key) for key in ("rank", "modules", "hash") if hasattr(made, key)}
        if facts.get("hash"):
            facts |= {"changed": len(made.tensors), "left_out": list(made.left_out)}
        return {
            "to": self.form.value,
            "patch": self.patch.label,
            "digest": self.patch.digest,
            "base_hash": self.patch.base_hash,
            "base": None if self.base is None else str(self.base),
            "out": str(self.folder),
            "files": files,
            "bytes": sum((self.folder / name).stat().st_size for name in files),
            **facts,
            **figures,
        }

    def _adapter(self) -> Any:
        from nest_runtime.export.gguf import export_gguf
        from nest_runtime.export.peft import export_peft
        from nest_runtime.model.load import skeleton

        model = None if self.base is None else skeleton(self.base)
        common: dict[str, Any] = {"model": model, "overwrite": self.overwrite}
        if self.form is ExportForm.gguf:
            common["architecture"] = self._architecture()
            return export_gguf(self.patch, self.folder, **common, check=self._checker(self._gguf_figures))
        if self._can_check("peft"):
            common["check"] = self._checker(lambda reference, staging: reference.peft(staging))
        return export_peft(self.patch, self.folder, engine=self.form.value, **common)  # type: ignore[arg-type]

    def _merged(self, bars: Callable[[str, int, int], None]) -> Any:
        from nest_runtime.export.merged import export_merged

        if self.base is None:
            raise UsageError(
                f"--to merged needs the base of {self.patch.label} "
                f"({self.patch.base_model or 'unnamed'}, {self.patch.base_hash})",
                "name it with --model",
            )
        exact = self.base.is_file() or self._exact_base()
        check = self._checker(lambda reference, staging: reference.merged(staging), exact=exact)
        return export_merged(self.patch, self.base, self.folder, overwrite=self.overwrite, check=check, progress=bars)

    def _checker(
        self, measure: Callable[[Reference, Path], Measured], *, exact: bool = True
    ) -> Callable[[Path], None] | None:
        if not self.check:
            return None
        if self.base is None:
            self.out.note("not compared with the patch: the base is not known; name it with --model")
            return None
        base = self.base

        def compare(staging: Path) -> None:
            """Compare what was written with the patched base; of exact forms it must be the same."""
            from nest_runtime.export.measure import Reference
            from nest_runtime.model.load import load_model

            reference = Reference(self.patch, load_model(base, device="cpu", dtype="float32"))
            self.measured = measure(reference, staging)
            if exact:
                self.measured.check()

        return compare

    def _gguf_figures(self, reference: Reference, staging: Path) -> Measured:
        from nest_runtime.export.gguf import ADAPTER, read_pairs, tensor_names
        from nest_runtime.export.lora import layout_of, pairs_of

        pairs = pairs_of(self.patch, layout_of(self.patch, reference.model))
        return reference.pairs(read_pairs(staging / ADAPTER, tensor_names(self.patch, pairs, self._architecture())))

    def _architecture(self) -> str | None:
        """llama.cpp's name of the base's architecture where the base is a GGUF file."""
        from nest_runtime.model.gguf.header import read_header

        return read_header(self.base).architecture if self.base is not None and self.base.is_file() else None

    def _can_check(self, package: str) -> bool:
        from importlib.util import find_spec

        from nest_runtime.install import extra

        if self.check and find_spec(package) is None:
            self.out.note(f"not compared with the patch: {package} is not installed ({extra(package)})")
            return False
        return True

    def _exact_base(self) -> bool:
        """Whether the base is stored in float32: half-precision sums are rounded, by the nature of the form."""
        from nest_runtime.model.weights import read_frame, weight_files

        assert self.base is not None
        dtypes = {entry.dtype for path in weight_files(self.base) for entry in read_frame(path).entries}
        return not dtypes & {"BF16", "F16"}


def _base_of(patch: Patch, model: str | None) -> Path | None:
    """The folder or file of the patch's base: the one named, the reference model's, or where this machine saw it last.

    Raises:
        BaseMismatch: the model named is another.
    """
    from nest_runtime.model.load import REFERENCE, REFERENCE_FOLDER, known_base, resolve_model

    if model is None:
        if (REFERENCE_FOLDER / "config.json").is_file() and base_hash_of(REFERENCE) == patch.base_hash:
            return REFERENCE_FOLDER
        place = known_base(patch.base_hash)
        return None if place is None else resolve_model(place)[1]
    found = base_hash_of(model)
    if found != patch.base_hash:
        raise BaseMismatch(
            f"{patch.label} is for base {patch.base_hash}; {model} is {found}",
            "name the patch's own base, unpatched and unmerged",
        )
    return resolve_model(model)[1]


def _render(out: Output, document: dict[str, Any]) -> None:
    error, change = document["max_abs_error"], document["max_abs_change"]
    compared = (
        "not compared" if error is None else f"{error:.2g} off at most, where the patch moves logits by {change:.2g}"
    )
    out.pairs(
        {
            "patch": f"{document['patch']}  {document['digest']}",
            "folder": f"{document['out']} ({len(document['files'])} files, {size(document['bytes'])})",
            "logits": compared,
        }
    )
    if document.get("left_out"):
        out.note(f"left out, being unpatched weights in other forms: {', '.join(document['left_out'])}")
    out.note(f"next: {_next(document)}")


def _next(document: dict[str, Any]) -> str:
    """What to do with the folder."""
    base = shlex.quote(document["base"] or "BASE")
    folder = document["out"]
    if document["to"] == "peft":
        return f'PeftModel.from_pretrained(model, "{folder}")'
    if document["to"] == "gguf":
        file = base if (document["base"] or "").endswith(".gguf") else "BASE.gguf"
        return f"llama-server -m {file} --lora {folder}/adapter.gguf --no-cache-prompt --cache-ram 0"
    if document["to"] == "merged":
        return f"load {folder} as any other model"
    name = f"{document['patch'].replace('@', '-')}-{document['digest'][7:19]}"  # vLLM keys its cache by name
    sizes = f"--max-loras 2 --max-lora-rank {_vllm_rank(document)}"  # the last slot stays empty: docs/guide/exports.md
    return f"vllm serve {base} --enable-lora {sizes} --lora-modules {name}={folder}"


def _vllm_rank(document: dict[str, Any]) -> int:
    """The smallest --max-lora-rank that vLLM takes for the adapter."""
    from nest_runtime.export.peft import VLLM_RANKS

    return next(rank for rank in VLLM_RANKS if rank >= document["rank"])
