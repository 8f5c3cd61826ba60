#!/bin/sh
# An environment for tests/llama, apart from the project's: llama.cpp with its server, as the wheel xllamacpp holds it.
#   tests/llama/install.sh DIR           make it (110 MB)
#   tests/llama/install.sh DIR --test    make it if it is not there, and run the tests with the project's own Python
# xllamacpp (Apache-2.0) is a test tool, never a dependency: nothing but llama.cpp is used of it.
set -eu
where=${1:?name a folder for the environment}
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$where/bin/python" ]; then
  "${PYTHON:-python3.11}" -m venv "$where"
fi
if ! "$where/bin/python" -c "import xllamacpp" 2>/dev/null; then
  "$where/bin/pip" install -q --no-deps --only-binary :all: xllamacpp==2026.10.11549
fi
"$where/bin/python" -c "import xllamacpp; print('llama.cpp', xllamacpp.BUILD_INFO, 'of xllamacpp', xllamacpp.__version__)"
if [ "${2:-}" = "--test" ]; then
  cd "$here"
  NEST_LLAMA_PYTHON="$where/bin/python" exec python -m pytest -m llama tests/llama -n 0 -r pfEs -s
fi
