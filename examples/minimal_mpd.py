"""Mixed-policy distillation in one flat file: sample, rewrite, score, train.

    python examples/minimal_mpd.py            # the pocket models, on a CPU: about ten seconds

Other models of one family (not tried here):

    python examples/minimal_mpd.py --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-1.7B \\
        --prompts data/prompts/sample.jsonl \\
        --rewrite-prompt 'Rewrite this solution in fewer words. {problem} Solution: {draft}'

Everything is plain transformers and torch but the loss, mpd_train.kl.sparse_kl. The real commands
(mpd-gen, mpd-train) do the same in batches, with checks of the answer, files that survive a crash,
and packed sequences.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpd_train.kl import Divergence, sparse_kl

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "pipelines" / "pocket" / "models"
PROMPTS = ROOT / "data" / "prompts" / "pocket.jsonl"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--student", default=str(POCKET / "student"))
parser.add_argument("--teacher", default=str(POCKET / "teacher"))
parser.add_argument("--prompts", default=str(PROMPTS), help="JSONL with a column `problem`")
parser.add_argument(
    "--rewrite-prompt", default="rewrite shorter problem : {problem} draft : {draft}"
)
parser.add_argument("--score-context", choices=["problem", "rewrite"], default="rewrite")
parser.add_argument("--samples", type=int, default=2, help="drafts per problem")
parser.add_argument("--max-tokens", type=int, default=400)
parser.add_argument("--top-k", type=int, default=64, help="log-probabilities kept per token")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
tokenizer = AutoTokenizer.from_pretrained(args.student)  # both models must share it
student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
vocab = min(student.config.vocab_size, teacher.config.vocab_size)  # some are padded
end = tokenizer.eos_token_id


def prompt_ids(message: str) -> list[int]:
    """The ids after which the model's turn begins."""
    turns = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def continuations(model: torch.nn.Module, ids: list[int], **sampling: object) -> list[list[int]]:
    """What the model writes after `ids`, up to its end token, which is included."""
    given = torch.tensor([ids])
    settings = {"max_new_tokens": args.max_tokens, "eos_token_id": end, "pad_token_id": end}
    with torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), **settings, **sampling)
    written = [row[len(ids) :].tolist() for row in out]
    return [row[: row.index(end) + 1] if end in row else row for row in written]


def answer(ids: list[int]) -> str | None:
    """The last number of a finished trace."""
    words = tokenizer.decode(ids, skip_special_tokens=True).replace(".", " ").split()
    numbers = [word for word in words if word.isdigit()]
    return numbers[-1] if numbers and ids[-1] == end else None


# 1. Sample: the student writes drafts. 2. Rewrite: the teacher says each of them more briefly.
lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
problems, kept = [json.loads(line)["problem"] for line in lines], []
student.eval()
for problem in problems:
    question = prompt_ids(problem)
    many = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": args.samples}
    for draft in continuations(student, question, **many):
        shown = tokenizer.decode(draft, skip_special_tokens=True).strip()
        request = prompt_ids(args.rewrite_prompt.format(problem=problem, draft=shown))
        (rewrite,) = continuations(teacher, request, do_sample=False)
        # Keep a rewrite that has the draft's answer and is not longer.
        same = answer(draft) is not None and answer(rewrite) == answer(draft)
        if same and len(rewrite) <= len(draft):
            kept.append((question, request, draft, rewrite))
print(f"kept {len(kept)} rewrites of {len(problems) * args.samples} drafts")
if not kept:
    raise SystemExit("nothing to train on: give other --prompts, or a --teacher that can rewrite")
before, after = (sum(len(row[i]) for row in kept) for i in (2, 3))
most = max(kept, key=lambda row: len(row[2]) - len(row[3]))
print(f"draft:   {tokenizer.decode(most[2])}\nrewrite: {tokenizer.decode(most[3])}")
print(f"tokens: {before} in the drafts, {after} in the rewrites")

# 3. Score: the teacher's K best tokens at each position of a rewrite, and the mass of all others.
rows = []
for question, request, _, rewrite in kept:
    context = request if args.score_context == "rewrite" else question
    with torch.no_grad():
        logits = teacher(torch.tensor([context + rewrite])).logits[0, :, :vocab]
    # Position i predicts token i + 1.
    logprobs = logits[len(context) - 1 : -1].log_softmax(-1)
    top = logprobs.topk(min(args.top_k, vocab))
    tail = logprobs.scatter(1, top.indices, -torch.inf).logsumexp(1)
    rows.append((question, rewrite, top.indices, top.values, tail))

# 4. Train: KL to the teacher on the rewrite, under the student's own prompt.
optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
student.train()
for step in range(args.steps):
    loss = 0.0
    for question, rewrite, topk_ids, topk_logprobs, tail_logprobs in rows:
        states = student.base_model(torch.tensor([question + rewrite])).last_hidden_state[0]
        out = sparse_kl(
            states[len(question) - 1 : -1],  # [n, H]: the states that predict the rewrite
            student.get_output_embeddings().weight[:vocab],  # [V, H]
            topk_ids,  # [n, K]
            topk_logprobs,  # [n, K]
            tail_logprobs,  # [n]
            normalizer=after,  # one mean over all tokens of the step
            divergence=Divergence("reverse_kl"),
        )
        out.loss.backward()
        loss += out.loss.item()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss:.6f} nats per token, gradient norm {norm:.4f}")
