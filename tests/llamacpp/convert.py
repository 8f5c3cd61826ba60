"""llama.cpp's converter for a tiny model, whose tokenizer it cannot know: ``convert.py LLAMA.CPP MODEL OUT.gguf``.

Run as a program by the project's Python. The weights are converted by llama.cpp's own code, in float32; only the
tokenizer is written as a plain one.
"""

import runpy
import sys
from typing import Any


def main() -> None:
    source, model, out = sys.argv[1:]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import conversion
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    known = conversion.get_model_class

    def with_plain_vocabulary(name: str, mmproj: bool = False) -> Any:
        found = known(name, mmproj)
        found.set_vocab = lambda self: self._set_vocab_gpt2()
        return found

    conversion.get_model_class = with_plain_vocabulary
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f32"]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
