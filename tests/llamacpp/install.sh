#!/bin/sh
# An environment for tests/llamacpp, apart from the project's: llama.cpp, built from the source package of
# llama-cpp-python on PyPI, as that binding and as llama-server and llama-export-lora.
#   tests/llamacpp/install.sh DIR            make it (needs a C++ compiler; JOBS=N compiles N files at once, by default 2)
#   tests/llamacpp/install.sh DIR --test     make it if it is not there, and run the tests with the project's own Python
# PYTHON names the project's Python. llama-cpp-python (MIT) is a test tool, never a dependency.
set -eu
where=${1:?name a folder for the environment}
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
mkdir -p "$where"
where=$(cd "$where" && pwd)
source=$where/llama_cpp_python-$version
export CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-2}" PATH="$where/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
if [ ! -x "$where/bin/ninja" ]; then
  "$python" -m venv "$where"
  "$where/bin/pip" install -q 'cmake>=3.28' ninja 'scikit-build-core>=0.9.2' \
    numpy typing-extensions diskcache jinja2
fi
if [ ! -d "$source" ]; then
  "$where/bin/pip" download -q --no-deps --no-build-isolation --no-binary :all: -d "$where" "llama-cpp-python==$version"
  echo "$sha256  $source.tar.gz" | sha256sum -c --quiet -
  tar -xzf "$source.tar.gz" -C "$where"
fi
if ! "$where/bin/python" -c "import llama_cpp" 2>/dev/null; then
  # Not for this very processor: what the compiler knows of it is more than some virtual machines can (AMX: SIGILL).
  CMAKE_ARGS="-DLLAMA_OPENSSL=OFF -DGGML_NATIVE=OFF" "$where/bin/pip" install -q --no-deps --no-build-isolation \
    --no-binary llama-cpp-python -C build-dir="$where/build" "$source"
fi
if [ ! -x "$where/bin/llama-server" ]; then
  # What the binding was built of is not compiled again. mtmd belongs to the tools now, and no web page is fetched.
  cmake -S "$source" -B "$where/build" -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$where/cmake.log"
  cmake --build "$where/build" --target llama-server llama-export-lora >>"$where/cmake.log"
  ln -sf ../build/bin/llama-server ../build/bin/llama-export-lora "$where/bin/"
fi
"$where/bin/python" -c "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__)"
grep -o 'llama.cpp version: .*' "$where/cmake.log"
if [ "${2:-}" = "--test" ]; then
  cd "$here"
  NEST_LLAMACPP=$where OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
    exec "$python" -m pytest -m llamacpp tests/llamacpp -n 0 -r pfEs -s --durations=12 --timeout 1800
fi
