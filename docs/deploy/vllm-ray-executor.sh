#!/bin/sh
# One server over many machines: vLLM's own distributed executor on Ray. Two replicas of four ranks each; the one API
# server reaches all eight ranks, so a switch reaches every replica, or all go back to the old patch (docs/guide/engines.md).
#   ray start --head                      on the first machine; `ray start --address=…` on the others; then, on the first:
set -eu
: "${MODEL:?a folder or Hub id that every machine can read}" "${PATCH:?a patch reference}" "${TOKENS:?an admin token file}"
exec nest-runtime serve --engine vllm --model "$MODEL" --patch "$PATCH" --admin-token-file "$TOKENS" --admin-port 8001 \
  --engine-args "--distributed-executor-backend ray --tensor-parallel-size 4 \
                 --data-parallel-size 2 --data-parallel-backend ray"
