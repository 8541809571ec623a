"""Compiles the Triton kernels for GPUs that are not here: `python tests/compile_kernels.py 80 90`.

The interpreter runs what the compiler may refuse. Prints a line for each: kernel, block, warps,
GPU, registers, and for each pass over a row the instructions that a thread issues for one logit.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mpd_train.kl.divergence import NAMES, Divergence
from mpd_train.kl.objective import Objective
from mpd_train.kl.triton_kernels import _CONFIGS, _SPARSE, MOST_IDS, _constants, _dense, _sparse

_OBJECTIVES = [Objective(Divergence(name), 1.0, None, None, 0.0) for name in NAMES]
_OBJECTIVES.append(Objective(Divergence("jsd"), 2.0, 0.5, None, 0.3, 30.0, 30.0))
_OBJECTIVES.append(Objective(Divergence("reverse_kl"), 1.0, None, 0.5, 0.0))
_TYPES = {
    "logits": "*fp32", "students": "*fp32", "teachers": "*fp32", "ids": "*i32",
    "logprobs": "*fp16", "tails": "*fp16", "labels": "*i64", "factors": "*fp32", "out": "*bf16",
    "metrics": "*fp32", "vocab_size": "i32", "out_stride": "i32", "k": "i32", "clip": "fp32",
}  # fmt: skip


def main() -> None:
    for gpu in map(int, sys.argv[1:]):
        for objective in _OBJECTIVES:
            # Of labels it asks nothing but whether there are some.
            labels = True if objective.ce_weight > 0 else None
            constants = _constants(objective, labels)
            for config in _CONFIGS:
                compiled(_dense.fn, constants, config, gpu)
            for k in (64, MOST_IDS):
                buckets = {"BUCKETS": triton.next_power_of_2(k + 1)}
                compiled(_sparse, constants | buckets, _SPARSE, gpu)


def compiled(kernel: triton.JITFunction, constants: dict, config: triton.Config, gpu: int) -> None:
    names, warps = kernel.arg_names, config.num_warps
    constants = constants | config.kwargs
    arguments = [name for name in names if name in _TYPES]
    # What a launch finds out: that rows begin where 16 bytes do.
    aligned = [x for x in arguments if _TYPES[x][0] == "*" or x in ("vocab_size", "out_stride")]
    source = ASTSource(
        fn=kernel,
        signature={name: _TYPES.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options={"num_warps": warps})
    (programs,) = Path(triton.__file__).parent.glob("backends/nvidia/bin")
    target = re.search(r"\.target (\S+)", made.asm["ptx"])[1].split(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        path, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        path.write_text(made.asm["ptx"])
        said = subprocess.run(
            [programs / "ptxas", "-v", f"--gpu-name={target}", path, "-o", binary],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
        listing = subprocess.run(
            [programs / "nvdisasm", "-c", binary], check=True, capture_output=True, text=True
        ).stdout
    registers = re.search(r"Used (\d+) registers", said)[1]
    spilled = re.search(r"(\d+) bytes spill stores", said)[1]
    for_each = constants["BLOCK"] / (32 * warps)
    passes = " + ".join(f"{length / for_each:.0f}" for length in loops(listing))
    print(
        f"{kernel.__name__} {NAMES[constants['KIND']]}{' mixed' if constants['LABELS'] else ''}"
        f" buckets {constants.get('BUCKETS', '-')} block {constants['BLOCK']} warps {warps}"
        f" sm_{gpu} registers {registers} spilled {spilled} instructions {passes} a logit"
    )


def loops(listing: str) -> list[int]:
    """Instructions between each jump backwards and where it leads."""
    count, labels, found = 0, {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            count += 1
            to = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            # At the end of a kernel a jump leads to itself.
            if to and to[1] in labels and count - labels[to[1]] > 1:
                found.append(count - labels[to[1]])
    return found


if __name__ == "__main__":
    main()
