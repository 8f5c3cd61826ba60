"""llama.cpp over one model, and an adapter if one is named: ``binding.py MODEL.gguf [ADAPTER.gguf] [--float32]``.

Run as a program by the Python of the environment that install.sh makes; nothing of the project is imported. Each line
of stdin is a request in JSON, each line of stdout its answer; logits follow their line as raw float32. ``scale`` is
the adapter's; at 0 it is off. With ``--float32`` keys, values and attention are computed in float32 too; without it as
llama.cpp does by default.

    {"tokens": TEXT}                                              {"tokens": [...]}
    {"logits": [ids], "first": n, "scale": s}                     {"shape": [positions from n on, vocabulary]}
    {"answer": [ids], "count": n, "ends": [ids], "scale": s}      {"tokens": [...]}
"""

import ctypes
import json
import os
import sys

import llama_cpp.llama_cpp as api
import numpy as np

CONTEXT = 1024
ERROR = 4  # GGML_LOG_LEVEL_ERROR


@api.llama_log_callback
def log(level, text, _):  # type: ignore[no-untyped-def]
    """llama.cpp's errors go to stderr; what else it tells goes nowhere."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Llama:
    """One model with a context for one sequence."""

    def __init__(self, path: str, adapter: str | None, float32: bool) -> None:
        api.llama_log_set(log, None)
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.columns = api.llama_vocab_n_tokens(self.vocabulary)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", "1"))
        if float32:
            settings.type_k = settings.type_v = api.GGML_TYPE_F32
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, settings)
        self.batch = api.llama_batch_init(CONTEXT, 0, 1)
        self.adapter = api.llama_adapter_lora_init(self.model, adapter.encode()) if adapter else None
        if adapter and not self.adapter:
            raise SystemExit(f"llama.cpp does not take {adapter}")

    def begin(self, scale: float) -> None:
        """Forget the sequence, and set the adapter's scale."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        count = 1 if scale else 0
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(self.adapter) if count else None
        scales = (ctypes.c_float * 1)(scale) if count else None
        if api.llama_set_adapters_lora(self.context, adapters, count, scales):
            raise SystemExit(f"llama.cpp does not set the adapter's scale to {scale}")

    def feed(self, ids: list[int], start: int, first: int) -> np.ndarray:
        """Compute tokens from position ``start`` on; logits (positions, vocabulary) of those from ``first`` on."""
        for place, token in enumerate(ids):
            self.batch.token[place] = token
            self.batch.pos[place] = start + place
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, 0
            self.batch.logits[place] = place >= first
        self.batch.n_tokens = len(ids)
        if status := api.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama.cpp does not decode {len(ids)} tokens: {status}")
        rows = [api.llama_get_logits_ith(self.context, place) for place in range(first, len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (self.columns,)).copy() for row in rows])

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, control tokens read as such."""
        data = text.encode()
        found = (api.llama_token * (len(data) + 8))()
        return list(found[: api.llama_tokenize(self.vocabulary, data, len(data), found, len(found), False, True)])

    def answer(self, ids: list[int], count: int, ends: list[int]) -> list[int]:
        """The greedy answer, without the token that ends it."""
        found: list[int] = []
        logits = self.feed(ids, 0, len(ids) - 1)
        while len(found) < count:
            token = int(logits[-1].argmax())
            if token in ends:
                break
            found.append(token)
            logits = self.feed([token], len(ids) + len(found) - 1, 0)
        return found


def main() -> None:
    files = [item for item in sys.argv[1:] if not item.startswith("--")]
    llama = Llama(files[0], files[1] if len(files) > 1 else None, "--float32" in sys.argv)
    out = sys.stdout.buffer
    out.write(json.dumps({"ready": True, "system": api.llama_print_system_info().decode()}).encode() + b"\n")
    out.flush()
    for line in sys.stdin:
        asked, numbers = json.loads(line), b""
        if "tokens" in asked:
            answer = {"tokens": llama.tokens(asked["tokens"])}
        elif "logits" in asked:
            llama.begin(asked["scale"])
            logits = llama.feed(asked["logits"], 0, asked["first"])
            answer, numbers = {"shape": logits.shape}, logits.tobytes()
        else:
            llama.begin(asked["scale"])
            answer = {"tokens": llama.answer(asked["answer"], asked["count"], asked["ends"])}
        out.write(json.dumps(answer).encode() + b"\n" + numbers)
        out.flush()


if __name__ == "__main__":
    main()
