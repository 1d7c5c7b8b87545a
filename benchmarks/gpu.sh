#!/usr/bin/env bash
# What qinit does on this machine's GPU, in at most 8 minutes, on a bare machine: torch, transformers, peft and numba are
# there, nothing is installed and nothing is fetched.
#
#   bash benchmarks/gpu.sh --json gpu.json          everything; what is measured is kept part by part
#   bash benchmarks/gpu.sh --device cpu --tiny      the same on a CPU with tiny shapes: a rehearsal
#
# Pure-Python packages that are missing (pydantic and what it needs) may lie as wheels in $WHEELS (.whl).
set -u
cd "$(dirname "$0")/.." || exit 1
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
wheels=("${WHEELS:-.whl}"/*.whl)
if [ -e "${wheels[0]}" ]; then
  ${PYTHON:-python3} -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$place/site" "${wheels[@]}" || exit 1
fi
# setup.py gives these folders their names.
mkdir -p "$place/links"
ln -s "$PWD/cli" "$place/links/qinit_cli"
ln -s "$PWD/model_zoo/demo" "$place/links/qinit_demo"
ln -s "$PWD/model_zoo/adapters" "$place/links/qinit_templates"
export PYTHONPATH="$place/site:$PWD:$place/links" PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR="$place/numba"
timeout "${LIMIT:-470}" ${PYTHON:-python3} benchmarks/gpu.py "$@"
