"""Steps with and without `mpd-train --compile` on one thread of a CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/compile_cpu.py

Forward and backward pass with the loss from cached top 64, of the pocket student and of a random
Qwen3 of 8 layers and width 512; packs of three lengths. The two take turns, step by step, and CPU
time is counted, so that what else the machine does moves both. Prints a Markdown table.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._dynamo.utils import counters

from mpd_train.kl import sparse_kl
from mpd_train.model.loading import compile_layers

POCKET = Path(__file__).resolve().parents[1] / "pipelines" / "pocket" / "models" / "student"
K, WARM = 64, 3


def pocket() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)


def middle() -> Any:
    config = transformers.Qwen3Config(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, vocab_size=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config)


def step(model: Any, tokens: int) -> float:
    """CPU seconds of a pass over `tokens` in sequences of 200."""
    head = model.get_output_embeddings().weight
    vocab = head.shape[0]
    ids = torch.arange(tokens)[None] * 7 % vocab
    record = (
        torch.arange(K).expand(tokens, K),
        torch.full((tokens, K), -5.0),
        torch.full((tokens,), -1.0),
    )
    begun = time.process_time()
    states = model.base_model(
        input_ids=ids, position_ids=torch.arange(tokens)[None] % 200, use_cache=False
    ).last_hidden_state[0]
    sparse_kl(states, head, *record, normalizer=float(tokens)).loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return time.process_time() - begun


def main() -> None:
    print("| student | s a step | compiled | times as fast | first step, s | graphs |")
    print("|---|---|---|---|---|---|")
    cases = (("pocket", pocket, (600, 571, 543), 30), ("middle", middle, (1024, 1000, 1017), 6))
    for name, make, lengths, steps in cases:
        plain, compiled = make().train(), make().train()
        compile_layers(compiled)
        torch._dynamo.reset()
        counters.clear()
        first = step(compiled, lengths[0])
        pairs = []
        for i in range(WARM + steps):
            tokens = lengths[i % len(lengths)]
            pairs.append((step(plain, tokens), step(compiled, tokens)))
        pairs = pairs[WARM:]
        before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        graphs = counters["stats"]["unique_graphs"]
        print(
            f"| {name} | {before:.3f} | {after:.3f} | {ratio:.2f} | {first:.0f} | {graphs} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
