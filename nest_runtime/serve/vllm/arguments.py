"""The command line that vLLM's server is started with, from a ServeConfig. Needs no vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path

from nest_runtime.errors import UsageError
from nest_runtime.serve.config import ServeConfig
from nest_runtime.serve.limits import Limits
from nest_runtime.serve.vllm.slots import BASE_NAME, DEFAULT_PATCHES, PLUGIN, SPARE

MAX_RANK = 64  # of a loaded patch's adapter, unless the engine is told otherwise
OURS = ("--model", "--served-model-name", "--host", "--port", "--api-key", "--worker-extension-cls", "--lora-modules")


def engine_arguments(config: ServeConfig, folder: Path, port: int) -> list[str]:
    """What to start vLLM with.

    Args:
        config: how to serve.
        folder: the model's checkpoint.
        port: where to listen.

    Raises:
        UsageError: the model is a GGUF file, a setting has no counterpart there, or ``engine_args`` says what
            nest-runtime says itself.
    """
    more = shlex.split(config.engine_args)
    given = {name(argument) for argument in more}
    for flag in OURS:
        if flag in given:
            raise UsageError(f"--engine-args holds {flag}, which nest-runtime sets itself", "leave it out")
    _refuse_settings(config)
    if folder.is_file():
        raise UsageError(
            f"{folder.name} is a GGUF file; --engine vllm serves folders with safetensors",
            "leave --engine out, or name the model's safetensors checkpoint and a patch made for it",
        )
    limits = config.limits
    arguments = ["--model", str(folder), "--served-model-name", BASE_NAME]
    arguments += ["--host", config.host, "--port", str(port), "--disable-uvicorn-access-log"]
    settings = {
        "--max-num-seqs": str(limits.running),
        "--shutdown-timeout": str(round(limits.drain_seconds)),
        "--api-server-count": "1",
        "--dtype": config.dtype,
        "--allowed-origins": "[]",  # vLLM's own default is every site; --cors-origin is seen to in front of it
    }
    if config.expose or config.expose_base:
        arguments.append("--enable-lora")
        slots = str(DEFAULT_PATCHES + SPARE)
        settings |= {"--max-loras": slots, "--max-lora-rank": str(MAX_RANK)}
    if config.ssl_certfile is not None:
        settings["--ssl-certfile"] = str(config.ssl_certfile)
    if config.ssl_keyfile is not None:
        settings["--ssl-keyfile"] = str(config.ssl_keyfile)
    if config.trust_remote_code:
        arguments.append("--trust-remote-code")
    for flag, value in settings.items():
        if flag not in given:
            arguments += [flag, value]
    return arguments + more


def name(argument: str) -> str:
    """The flag in an argument, as it is documented: ``--max_loras=4`` is ``--max-loras``."""
    return argument.partition("=")[0].replace("_", "-")


def _refuse_settings(config: ServeConfig) -> None:
    usual = Limits()
    if config.limits.cache_tokens is not None:
        raise UsageError("--cache-tokens is the transformers engine's", "--engine-args '--gpu-memory-utilization 0.9'")
    if config.limits.batch_tokens != usual.batch_tokens:
        raise UsageError("--batch-tokens is the transformers engine's", "--engine-args '--max-num-batched-tokens N'")
    if config.limits.max_prompt_tokens is not None:
        raise UsageError("--max-prompt-tokens is the transformers engine's", "--engine-args '--max-model-len N'")
    for flag, same in (
        ("--max-connections", config.limits.connections is None),
        ("--header-timeout", config.limits.header_seconds == usual.header_seconds),
        ("--idle-timeout", config.limits.idle_seconds == usual.idle_seconds),
    ):
        if not same:
            raise UsageError(f"{flag} is the transformers engine's", "put a proxy in front that limits connections")
    if config.device != "auto":
        raise UsageError(f"--device {config.device} is the transformers engine's", "set CUDA_VISIBLE_DEVICES instead")


def environment(plugins: str | None) -> str:
    """``VLLM_PLUGINS`` with ours named: vLLM loads plugins that add routes only where they are."""
    named = [plugin for plugin in (plugins or "").split(",") if plugin]
    return ",".join(named if PLUGIN in named else [*named, PLUGIN])
