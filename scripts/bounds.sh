#!/bin/sh
# Run a quick part of the tests with the lowest direct versions that pyproject.toml allows, or with the
# newest: `bounds.sh lowest` or `bounds.sh newest`, in build/lowest or build/newest. Without vLLM, whose
# releases each want one version of torch and transformers: tests take the transformers engine.
set -eu
cd "$(dirname "$0")/.."
versions=$1
case $versions in
    lowest) constraints="-c constraints/lowest.txt" ;;
    newest) constraints="--upgrade" ;;
    *) echo "bounds.sh: lowest or newest, not $versions" >&2; exit 2 ;;
esac
uv=$(command -v uv || echo .venv/bin/uv)
bin=build/$versions/bin
[ -x "$bin/python" ] || "$uv" venv --quiet --python "${PYTHON:-python3}" "build/$versions"
# shellcheck disable=SC2086  # no or two words
"$uv" pip install --quiet --python "$bin/python" $constraints pytest hatchling setuptools \
    --editable '.[train,openai,lora,hub,checkers,reasoning-gym,liger,ray,serve,tensorboard,trackio,wandb]'
"$uv" pip check --python "$bin/python"
"$uv" pip list --python "$bin/python" | grep -E '^(click|polars|pyarrow|pydantic|torch|transformers) '
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$bin/python" -m pytest -q tests/test_cli.py tests/test_filters.py \
    tests/test_inspection.py tests/test_packaging.py tests/test_shards.py tests/test_tracking.py tests/test_train.py
