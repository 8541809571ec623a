#!/bin/sh
# One round of mixed-policy distillation, by hand: `make install`, then sh pipelines/pocket/by_hand.sh
# The tutorial (docs/tutorial.md) goes through these commands one by one. Each resumes if it is run again.
set -eu
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
[ -f data/pocket/ood.jsonl ] || python -m pipelines.pocket.prompts --out data/pocket

# 1. Sample: the student writes four drafts for each of 320 problems.
mpd-gen rollouts --model pipelines/pocket/models/student --prompts data/pocket/train.jsonl \
    --out runs/hand/round1 --round 1 --num-prompts 320 --num-samples 4 \
    --id-column id --answer-column answer --max-tokens 400 --dtype float32

# 2. Rewrite: the teacher rewrites each draft, and scores the rewrites that are kept.
mpd-gen rewrite --teacher pipelines/pocket/models/teacher --shards runs/hand/round1 \
    --template pipelines/pocket/rewrite.toml --score-context rewrite --max-tokens 200 --dtype float32

# 3. Train: the student learns the teacher's distribution over the kept rewrites.
mpd-train --student pipelines/pocket/models/student --shards runs/hand/round1 --out runs/hand/train \
    --divergence reverse_kl --learning-rate 5e-4 --pack-length 1024 --gradient-accumulation-steps 4

# 4. Measure: the old and the new student solve the same held-out problems.
for model in base new; do
    [ $model = base ] && folder=pipelines/pocket/models/student || folder=runs/hand/train/model
    mpd-gen rollouts --model $folder --prompts data/pocket/test.jsonl --out runs/hand/$model \
        --num-prompts 250 --num-samples 4 \
        --id-column id --answer-column answer --metadata-columns family --max-tokens 400 --dtype float32
done

# 5. Compare: accuracy and tokens, with intervals.
mpd-gen compare runs/hand/base runs/hand/new --by family
