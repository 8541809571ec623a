"""How exact is a round? Its stored log-probabilities against a float32 teacher's own, and the
loss of the teacher against itself through the whole path, which should be zero:

    python benchmarks/exactness.py ROUND TEACHER

ROUND was rewritten by TEACHER with --score-context problem. Prints a Markdown table.
"""

import sys
from pathlib import Path

import torch

from mpd_data.common.models import resolve_model
from mpd_train.config import LossConfig
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM


def main(round_dir: Path, teacher_name: str) -> None:
    torch.manual_seed(0)
    shards = ShardSet([round_dir])
    if shards.metadata["score_context"] != "problem":
        raise SystemExit(f"{round_dir}: scored under the rewrite prompt; needs 'problem'")
    vocab = shards.metadata["vocab_size"]
    teacher = CausalLM(resolve_model(teacher_name), torch.device("cpu"), torch.float32, False)
    packs = make_packs(shards, 2048, 0, 0)
    normalizer = float(sum(pack.num_loss_tokens for pack in packs))
    cached = dense = excess = worst = 0.0
    lowest = float("inf")
    for pack in packs:
        batch = load_pack(shards, pack)
        with torch.no_grad():
            logits = teacher.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits[0, batch.loss_positions, :vocab]
            exact = logits.double().log_softmax(-1)
        exact = exact.gather(1, batch.topk_ids)
        error = (batch.topk_logprobs.double() - exact).abs()
        worst = max(worst, float(error.max()))
        excess = max(excess, float((error - 2**-11 * exact.abs()).max()))
        output = pack_loss(teacher, None, batch, vocab, LossConfig(), normalizer)
        cached += output.loss.item()
        lowest = min(lowest, float(output.per_token.min()))
        dense += pack_loss(teacher, teacher, batch, vocab, LossConfig(), normalizer).loss.item()
    print(f"{shards.num_rows} rows, {int(normalizer)} loss tokens, K = {batch.topk_ids.shape[1]}\n")
    print("| | |\n|---|---|")
    print(f"| largest error of a stored log-probability | {worst:.1e} |")
    print(f"| the same beyond float16's own 2^-11 of the value | {excess:.1e} |")
    print(f"| forward KL, teacher = student, cached records, nats per token | {cached:.1e} |")
    print(f"| smallest per-token value of it | {lowest:.1e} |")
    print(f"| forward KL, teacher = student, full vocabulary | {dense:.1e} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
