"""llama.cpp's converter for a tiny model, whose tokenizer it cannot know: ``convert.py LLAMA.CPP MODEL OUT.gguf JSON``.

Run as a program by the project's Python. The weights are converted by llama.cpp's own code, in float32; only the
tokenizer is written as a plain one. JSON holds settings in the names of older checkpoints, which the converter wants
and this transformers does not write.
"""

import json
import runpy
import sys
from typing import Any


def main() -> None:
    source, model, out, older = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import conversion
    import transformers
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast  # no tokens added by the model's own class
    known, settings = conversion.get_model_class, conversion.ModelBase.load_hparams
    conversion.ModelBase.load_hparams = staticmethod(
        lambda *given, **more: settings(*given, **more) | json.loads(older)
    )

    def with_plain_vocabulary(name: str, mmproj: bool = False) -> Any:
        found = known(name, mmproj)
        found.set_vocab = lambda self: self._set_vocab_gpt2()
        return found

    conversion.get_model_class = with_plain_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
