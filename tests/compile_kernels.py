"""Compiles the Triton kernels for GPUs that are not here: `python tests/compile_kernels.py 80 90`.

The interpreter runs what the compiler may refuse. Prints a line for each: kernel, GPU, registers.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpd_train.kl import NAMES, Divergence
from mpd_train.kl.objective import Objective
from mpd_train.kl.triton_kernels import MOST_IDS, _constants, _dense, _sparse

_OBJECTIVES = [Objective(Divergence(name), 1.0, None, 0.0) for name in NAMES]
_OBJECTIVES.append(Objective(Divergence("jsd"), 2.0, 0.5, 0.3))
_TYPES = {
    "logits": "*fp32", "students": "*fp32", "teachers": "*fp32", "ids": "*i32",
    "logprobs": "*fp16", "tails": "*fp16", "labels": "*i64", "factors": "*fp32", "out": "*bf16",
    "found": "*fp32", "vocab_size": "i32", "out_stride": "i32", "k": "i32", "clip": "fp32",
}  # fmt: skip


def main() -> None:
    for gpu in map(int, sys.argv[1:]):
        for objective in _OBJECTIVES:
            # Of labels it asks nothing but whether there are some.
            labels = True if objective.ce_weight > 0 else None
            constants = _constants(objective, labels) | {"BLOCK": 4096}
            compiled(_dense.fn, constants, gpu)
            for k in (64, MOST_IDS):
                compiled(_sparse, constants | {"BUCKETS": triton.next_power_of_2(k + 1)}, gpu)


def compiled(kernel: triton.JITFunction, constants: dict, gpu: int) -> None:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: _TYPES.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    made = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": 8})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(made.asm["ptx"])
        (ptxas,) = Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas")
        target = re.search(r"\.target (\S+)", made.asm["ptx"])[1].split(",")[0]
        said = subprocess.run(
            [ptxas, "-v", f"--gpu-name={target}", path, "-o", Path(folder) / "kernel.cubin"],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", said)[1]
    spilled = re.search(r"(\d+) bytes spill stores", said)[1]
    buckets = constants.get("BUCKETS", "-")
    print(f"{kernel.__name__} buckets {buckets} sm_{gpu} registers {registers} spilled {spilled}")


if __name__ == "__main__":
    main()
