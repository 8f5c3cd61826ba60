#!/bin/sh
# What the Dockerfile runs, in the venv $VENV: once for torch, once for the package.
#
#   install.sh torch cpu|cuda      torch alone, from PyTorch's CPU wheels or from PyPI's, which bring CUDA
#   install.sh package [EXTRAS]    nest-runtime from the folder it is called in, with extras
set -eu

pip="${VENV:-/opt/nest-runtime}/bin/pip"
version=$(sed -n 's/^torch==//p' constraints.txt)

case "$1:${2:-}" in
  torch:cpu) "$pip" install "torch==$version" --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple -c constraints.txt ;;
  torch:cuda) "$pip" install "torch==$version" -c constraints.txt ;;
  package:) "$pip" install -c constraints.txt . ;;
  package:*) "$pip" install -c constraints.txt ".[$2]" ;;
  *) echo "install.sh: '$*' is none of: torch cpu, torch cuda, package [EXTRAS]" >&2; exit 2 ;;
esac
