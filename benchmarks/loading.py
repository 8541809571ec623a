"""Memory of the processes that load a model together, on a CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/loading.py

A random Qwen3 of 319 M parameters (1,217 MiB in float32), shared out among the processes as
mpd-train does it; prints each one's peak above where it stood with its libraries, and what it
keeps.
"""

import tempfile
import time
from pathlib import Path

import torch
import transformers

from mpd_data.common.models import ModelFiles
from mpd_train.distributed import ranks
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.sharding import load_sharded


def of_process(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])


def make_model(folder: Path) -> None:
    config = transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, vocab_size=32_768, tie_word_embeddings=False,
        dtype="float32",
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)


def main() -> None:
    with ranks() as joined, tempfile.TemporaryDirectory() as name:
        # One folder, whose name the first process makes.
        folders = [name]
        torch.distributed.broadcast_object_list(folders)
        folder = Path(folders[0])
        if joined.first:
            # In a process of its own: what it takes is not ours.
            torch.multiprocessing.spawn(_make, (folder,))
        joined.wait()
        files = ModelFiles("random", folder, "", 32_768, 4096)
        before, begun = of_process("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        cpu = torch.device("cpu")
        loaded = load_sharded(
            lambda place: CausalLM(files, place, torch.float32, False), cpu, joined
        )
        seconds = time.perf_counter() - begun
        peak, kept = of_process("VmHWM") - before, of_process("VmRSS") - before
        total = sum(p.numel() for p in loaded.model.parameters())
        for rank in range(joined.size):
            joined.wait()
            if rank == joined.rank:
                print(
                    f"| {rank} | {total / 1e6:.0f} M | {peak / 2**20:,.0f} | {kept / 2**20:,.0f}"
                    f" | {seconds:.1f} |",
                    flush=True,
                )


def _make(_: int, folder: Path) -> None:
    make_model(folder)


if __name__ == "__main__":
    main()
