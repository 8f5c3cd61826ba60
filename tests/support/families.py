"""The matrix of docs/guide/models.md: every family as a tiny random model, and the whole way of a patch on it.

``python -m tests.support.families`` writes what it measures into the page; model/test_matrix.py compares the two.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nest_runtime.errors import EngineError, ExportError
from nest_runtime.export import export_gguf, export_merged, export_peft, import_peft
from nest_runtime.model.load import LoadedModel, load_model
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.pipeline import train_patch
from tests.conftest import save_tiny
from tests.support.engine import alone, answers
from tests.support.train import QUICK, benign_examples, harmful_examples

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "models.md"
IDS = torch.tensor([[1, 7, 30, 45, 100, 9], [1, 8, 31, 46, 101, 10]])
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
ALL_HEADS = {**SMALL, "num_key_value_heads": 2}  # for classes that share no keys: paging believes the configuration
HEADS = {**SMALL, "head_dim": 16}
EXPERTS = {**HEADS, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
TEXT = {"vocab_size": 300, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = {**VISION, "image_size": 16, "patch_size": 8}
TUNED = QUICK.evolve(steps=2, validate_every=2, lr=0.3, probe_steps=50, delta_dtype="float32")


@dataclass(frozen=True)
class Family:
    """One row: what people call it, and the tiny model that stands for it."""

    title: str
    model_class: str
    config_class: str
    sizes: dict[str, Any] = field(default_factory=lambda: SMALL)

    def save(self, folder: Path) -> Path:
        """Write the tiny model, whose random weights are large enough for a patch to matter."""
        return save_tiny(folder, self.model_class, self.config_class, **{"initializer_range": 0.2, **self.sizes})


FAMILIES = [
    Family("Llama 2, Llama 3, SmolLM 1 and 2", "LlamaForCausalLM", "LlamaConfig"),
    Family("SmolLM 3", "SmolLM3ForCausalLM", "SmolLM3Config"),
    Family("Mistral", "MistralForCausalLM", "MistralConfig"),
    Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", "Qwen2Config"),
    Family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", HEADS),
    Family("Gemma", "GemmaForCausalLM", "GemmaConfig", HEADS),
    Family("Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", HEADS),
    Family("Gemma 3 (text)", "Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    Family("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config"),
    Family("Phi-3, Phi-4-mini", "Phi3ForCausalLM", "Phi3Config"),
    Family("GLM-4 (0414)", "Glm4ForCausalLM", "Glm4Config", HEADS),
    Family("GLM-4 (9B)", "GlmForCausalLM", "GlmConfig", HEADS),
    Family(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_key_value_heads": 4}
    ),
    Family("GPT-NeoX, Pythia", "GPTNeoXForCausalLM", "GPTNeoXConfig", ALL_HEADS),
    Family("Falcon", "FalconForCausalLM", "FalconConfig", ALL_HEADS),
    Family("OPT", "OPTForCausalLM", "OPTConfig", {**ALL_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("StarCoder2", "Starcoder2ForCausalLM", "Starcoder2Config"),
    Family("Mixtral", "MixtralForCausalLM", "MixtralConfig", EXPERTS),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "moe_intermediate_size": 24}),
    Family("gpt-oss (unquantized)", "GptOssForCausalLM", "GptOssConfig", EXPERTS),
    Family(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**TEXT, **HEADS, "initializer_range": 0.2},
            "vision_config": PICTURES,
            "mm_tokens_per_image": 4,
            "image_token_index": 290,
            "boi_token_index": 291,
            "eoi_token_index": 292,
        },
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {**TEXT, **HEADS, "initializer_range": 0.2},
            "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
            "image_token_id": 290,
            "video_token_id": 291,
            "vision_start_token_id": 292,
            "vision_end_token_id": 293,
        },
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**TEXT, **SMALL, "model_type": "llama", "initializer_range": 0.2},
            "vision_config": {**PICTURES, "model_type": "clip_vision_model"},
            "image_token_index": 290,
        },
    ),
]
COLUMNS = (
    "models",
    "class tested",
    "neurons are rows of",
    "locate, cluster, tune",
    "hook = fold = dense",
    "off, bit for bit",
    "a patch a row",
    "served",
    "peft",
    "merged",
    "vllm form",
    "gguf",
)


def walk(family: Family, folder: Path, work: Path) -> dict[str, str]:
    """The whole way on one family, each step compared with what it should give; what works, as a row of the table.

    Args:
        family: the family.
        folder: its saved tiny model.
        work: an empty folder for files.
    """
    loaded = load_model(folder, device="cpu", dtype="float32")
    trained = train_patch(
        loaded.model,
        loaded.tokenizer,
        harmful_examples(5),
        benign_examples(5),
        recipe=TUNED,
        name="m",
        version="v1",
        base_hash=loaded.hash,
    ).patch
    assert all(site.n_neurons for site in trained.sites)
    patch = read_patch(trained.save(work / "p.safetensors"))
    assert patch == trained
    hook, fold = through_runtime(loaded, patch)
    reference = dense(loaded.model, patch)
    assert close(hook, logits(reference))
    assert close(fold, logits(reference))
    return {
        "models": family.title,
        "class tested": f"`{family.model_class}`",
        "neurons are rows of": ", ".join(f"`{name}`" for name in matrices(patch)),
        "locate, cluster, tune": "✓",
        "hook = fold = dense": "✓",
        "off, bit for bit": "✓",
        "a patch a row": "✓",
        "served": served(folder, patch),
        **exports(loaded, folder, patch, hook, fold, work),
    }


def through_runtime(loaded: LoadedModel, patch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by hook and folded; on the way the base, bit for bit, and a batch whose rows differ in their patch."""
    model = loaded.model
    base, weights = logits(model), copy.deepcopy(model.state_dict())
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        runtime.activate("v1", mode="hook")
        hook = logits(model)
        assert not close(hook, base, 1e-3)
        runtime.deactivate()
        assert torch.equal(logits(model), base)
        runtime.activate("v1", mode="fold")
        fold = logits(model)
        with runtime.using_rows([None, "v1"]):
            mixed = logits(model)
        assert close(mixed[0], base[0])
        assert close(mixed[1], hook[1])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert torch.equal(logits(model), base)
    return hook, fold


def served(folder: Path, patch: Patch) -> str:
    """Which engine serves it, with the base and the patch in one batch: ✓ the default one, ``generate``, or none."""
    base, patched = [list(range(6, 20)), list(range(30, 80))], [list(range(6, 20)), list(range(9, 13))]
    for kind, mark in (("transformers", "✓"), ("generate", "`generate`")):
        model = load_model(folder, device="cpu", dtype="float32").model
        runtime = PatchRuntime(model)
        runtime.add(patch)
        with runtime.using(patch.digest):
            expected = [alone(model, ids, 6) for ids in patched]
        expected += [alone(model, ids, 6) for ids in base]
        asked = [(ids, patch.digest, 6) for ids in patched] + [(ids, None, 6) for ids in base]
        try:
            found = answers(model, kind, [asked], runtime=runtime)
        except EngineError:
            continue
        assert found == [expected]
        return mark
    return "–"


def exports(
    loaded: LoadedModel, folder: Path, patch: Patch, hook: torch.Tensor, fold: torch.Tensor, work: Path
) -> dict[str, str]:
    """Every export compared with the patch; a dash where it is refused."""
    from peft import PeftModel

    works, columns = {}, {"peft": "peft", "vllm": "vllm form"}
    for engine in columns:
        try:
            export_peft(patch, work / engine, model=loaded.model, engine=engine)  # type: ignore[arg-type]
        except ExportError:
            works[columns[engine]] = "–"
            continue
        assert import_peft(work / engine) == patch
        wearing = PeftModel.from_pretrained(loaded.model, str(work / engine)).eval()
        assert float((logits(wearing) - hook).abs().max()) <= 1e-5
        loaded.model = wearing.unload()
        works[columns[engine]] = "✓"
    try:
        export_gguf(patch, work / "gguf", model=loaded.model)
        works["gguf"] = "✓"
    except ExportError:
        works["gguf"] = "–"
    export_merged(patch, folder, work / "merged")
    assert torch.equal(logits(load_model(work / "merged", device="cpu", dtype="float32").model), fold)
    return {**works, "merged": "✓"}


def matrices(patch: Patch) -> list[str]:
    """The patched weights of the first layer, without layer and halves."""
    names = [re.sub(r".*\.\d+\.", "", site.name.partition(":")[0]) for site in patch.sites]
    return list(dict.fromkeys(names))


def dense(model: torch.nn.Module, patch: Patch) -> torch.nn.Module:
    """W + ΔW written out on a copy, without any code of the runtime or of anatomy."""
    patched = copy.deepcopy(model)
    for site in patch.sites:
        path, _, half = site.name.partition(":")
        owner = patched.get_submodule(path.rpartition(".")[0])
        number = 1 if half == "up" else 0
        if path.endswith("experts.gate_up_proj"):
            weight = owner.gate_up_proj.data
            outputs = weight.transpose(1, 2) if "GptOss" in type(owner).__name__ else weight  # (E, 2F, d), a view
            change = site.dense().reshape(len(weight), -1, site.d_in)
            interleaved = "GptOss" in type(owner).__name__
            part = outputs[:, number::2] if interleaved else outputs.chunk(2, dim=1)[number]
            part += change
        else:
            module = patched.get_submodule(path)
            weight = module.weight.data.t() if type(module).__name__ == "Conv1D" else module.weight.data
            part = weight.chunk(2)[number] if half else weight
            part += site.dense()
    return patched


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def line(row: dict[str, str]) -> str:
    """A row as the page has it."""
    return f"| {' | '.join(row[column] for column in COLUMNS)} |"


def table(rows: list[dict[str, str]]) -> str:
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    return "\n".join([head, *(line(row) for row in rows)])


def write_page() -> None:
    """Measure every family and put the table between the page's markers."""
    rows = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            folder = family.save(Path(name) / "model")
            (Path(name) / "work").mkdir()
            rows.append(walk(family, folder, Path(name) / "work"))
            print(line(rows[-1]), file=sys.stderr)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- matrix -->\n")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}<!-- matrix -->\n{table(rows)}\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    write_page()
