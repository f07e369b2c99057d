#!/bin/sh
# Installs this project into /opt/spresso of a Debian 12 image: install.sh cpu|cuda. Dockerfile and spresso.def run it.
set -eu
kind=$1
here=$(dirname "$(realpath "$0")")
source=$(dirname "$(dirname "$here")")

case $kind in
  cuda) torch_index= ;;  # PyPI's torch for Linux brings CUDA
  cpu) torch_index=${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu} ;;
  *) echo "install.sh: TORCH=$kind is neither cpu nor cuda" >&2; exit 2 ;;
esac

# torch.compile needs a compiler and Python's headers while a run trains, not only here.
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
  ca-certificates g++ python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/spresso
# Torch goes first, from its own index: a requirement that pip resolves later finds it installed.
/opt/spresso/bin/pip install --no-cache-dir --constraint "$here/constraints.txt" \
  ${torch_index:+--index-url "$torch_index" --extra-index-url https://pypi.org/simple} torch
/opt/spresso/bin/pip install --no-cache-dir --constraint "$here/constraints.txt" "$source[stable_audio]"
/opt/spresso/bin/spresso --version
