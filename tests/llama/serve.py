"""Runs llama.cpp's server in the environment that install.sh makes: serve.py MODEL.gguf [ADAPTER.gguf].

Prints its address on one line of stdout and ends with its standard input. Run as a program; nothing here is the
project's, and nothing is imported from it.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames, params.port = ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 512, 1, 512, 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_gpu_layers, params.warmup, params.verbosity = 0, False, -1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if len(sys.argv) > 2:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
