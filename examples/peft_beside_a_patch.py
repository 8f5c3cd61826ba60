"""A PEFT adapter and a safety patch on one model: the adapter teaches the task, the patch keeps the refusals.

    python examples/peft_beside_a_patch.py [ADAPTER_FOLDER]

Without a folder it makes an adapter of random numbers. Adapters on q_proj and v_proj do not touch a patch's rows.
One on gate_proj or up_proj adds to the same outputs: measure both together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import nest_runtime as nest


def main(adapter: str | None) -> None:
    """Answer with patch alone, adapter alone, both, and neither."""
    loaded = nest.load_model("reference")
    runtime = nest.PatchRuntime(loaded.model)
    version = runtime.add(nest.load_patch("v3"))  # before the adapter: the base is checked as it was published
    if adapter is None:
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        both = get_peft_model(loaded.model, config)
    else:
        both = PeftModel.from_pretrained(loaded.model, adapter)

    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I bake bread?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    def logits(patch: str | None, *, adapted: bool) -> torch.Tensor:
        with torch.inference_mode(), runtime.using(patch):
            if adapted:
                return both(**ids).logits
            with both.disable_adapter():
                return both(**ids).logits

    base = logits(None, adapted=False)
    for name, patch, adapted in (("adapter", None, True), ("patch", version, False), ("both", version, True)):
        moved = (logits(patch, adapted=adapted) - base).abs().max()
        print(f"{name}: moves the logits by up to {moved:.3f}")
    assert torch.equal(logits(None, adapted=False), base)
    print("neither: the base, bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", metavar="ADAPTER_FOLDER")
    given = parser.parse_args()
    if given.adapter is not None and not (Path(given.adapter) / "adapter_config.json").is_file():
        parser.error(f"{given.adapter} is no folder of an adapter: it holds no adapter_config.json")
    try:
        main(given.adapter)
    except nest.NestError as error:  # it says what was found, and what to do
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
