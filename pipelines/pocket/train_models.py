"""Train the pocket student and teacher from scratch on one CPU core.

    python -m pipelines.pocket.train_models --out pipelines/pocket/models

The student learns to solve problems with traces that are mostly verbose and sometimes contain an
unnoticed wrong result. The teacher is the student with more layers. Half of its examples are
verbose solutions like the student's. In the other half it rewrites a draft into the concise trace
of the draft's route; half of these drafts are written by rule and half are sampled from the
student. All problems are from the "pretrain" split.
"""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pipelines.pocket.generation import Sample, load, rewrite_prompt, sample
from pipelines.pocket.tokenizer import END, MAX_LENGTH, build_tokenizer, prompt_ids
from pipelines.pocket.world import (
    FAMILIES,
    Split,
    ideal_rewrite,
    problems,
    sample_habit,
    sample_trace,
)

NUM_STUDENT_DRAFTS = 1500
NUM_CHECKED = 300
HIDDEN_SIZE = 128
HEAD_DIM = 32  # the smallest that vLLM's attention on CPU supports

# (token ids, number of prompt tokens): the loss is on the rest, which includes the end token
Example = tuple[list[int], int]
Examples = Iterator[Example]


@dataclass(frozen=True)
class Recipe:
    num_layers: int
    steps: int
    slip_rate: float  # chance, per line of arithmetic, of a wrong result in a solving trace
    # Twice as many steps with half the tokens cost the same and learn much faster here.
    tokens_per_step: int = 1500
    warmup_steps: int = 20
    decay_share: float = 0.5  # fraction of the steps, at the end, with a falling learning rate
    muon_lr: float = 0.02  # of the hidden matrices
    adamw_lr: float = 4e-3  # of embeddings, head and norms


STUDENT = Recipe(num_layers=3, steps=2400, slip_rate=0.005)
TEACHER = Recipe(num_layers=6, steps=1300, slip_rate=0.002, muon_lr=0.012, adamw_lr=2.5e-3)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=3 * HIDDEN_SIZE,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=HIDDEN_SIZE // HEAD_DIM,
            num_key_value_heads=HIDDEN_SIZE // HEAD_DIM,
            head_dim=HEAD_DIM,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            initializer_range=0.05,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def grow(small: Qwen3ForCausalLM, large: Qwen3ForCausalLM) -> None:
    """Initialise `large`, which has more layers of the same width, to compute what `small` does.

    The added layers come last. Their output matrices start at zero, so they change nothing at
    first.
    """
    missing, unexpected = large.load_state_dict(small.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("model.layers.") for name in missing)
    with torch.no_grad():
        for layer in large.model.layers[small.config.num_hidden_layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def encode(tokenizer: PreTrainedTokenizerFast, user: str, assistant: str) -> Example:
    prompt = prompt_ids(tokenizer, user)
    return prompt + tokenizer(f"{assistant} {END}").input_ids, len(prompt)


# Each of the next three yields training examples without end.
def solving(tokenizer: PreTrainedTokenizerFast, rng: random.Random, slip_rate: float) -> Examples:
    for problem in problems(rng, FAMILIES, "pretrain"):
        trace = sample_trace(rng, problem, sample_habit(rng), slip_rate)
        yield encode(tokenizer, problem.text, trace.text)


def rewriting(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, student_drafts: list[Sample]
) -> Examples:
    source = problems(rng, FAMILIES, "pretrain")
    while True:
        if rng.random() < 0.5:
            problem = next(source)
            slip_rate = rng.choice((0.0, 0.02, 0.06))
            draft = sample_trace(rng, problem, sample_habit(rng), slip_rate).text
        else:
            rollout = rng.choice(student_drafts)
            problem, draft = rollout.problem, rollout.text
        user = rewrite_prompt(problem.text, draft)
        yield encode(tokenizer, user, ideal_rewrite(problem, draft))


def evenly(rng: random.Random, first: Examples, second: Examples) -> Examples:
    while True:
        yield next(first if rng.random() < 0.5 else second)


def solve(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    split: Split,
    count: int,
    temperature: float,
) -> list[Sample]:
    """Sample the model's traces for `count` problems of a split, of all families."""
    chosen = islice(problems(rng, FAMILIES, split), count)
    messages = [(problem, problem.text) for problem in chosen]
    return sample(model, tokenizer, messages, temperature, seed=rng.randrange(2**31))


def summed_loss(model: Qwen3ForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Return the cross-entropy summed over the assistant's tokens, in nats.

    Examples are padded on the right, after all scored tokens, so causal attention needs no mask.
    """
    width = max(len(ids) for ids, _ in examples)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    positions = torch.arange(width - 1)  # position t predicts token t + 1
    begins = torch.tensor([prompt - 1 for _, prompt in examples])[:, None]
    ends = torch.tensor([len(ids) - 1 for ids, _ in examples])[:, None]
    scored = (positions >= begins) & (positions < ends)  # [examples, width - 1]
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[scored])
    return functional.cross_entropy(logits, tokens[:, 1:][scored], reduction="sum")


def batches(examples: Examples, rng: random.Random, num_tokens: int) -> Iterator[list[Example]]:
    """Yield batches of about `num_tokens` without end, each of examples of similar length."""
    while True:
        pool = sorted(islice(examples, 128), key=lambda example: len(example[0]))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if sum(len(ids) for ids, _ in cut[-1]) >= num_tokens:
                cut.append([])
            cut[-1].append(example)
        rng.shuffle(cut)
        yield from cut


def train(
    model: Qwen3ForCausalLM, recipe: Recipe, examples: Examples, rng: random.Random, log: Path
) -> None:
    """Train with Muon on the hidden matrices and AdamW on the rest; log every ten steps."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [
        (torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01), recipe.muon_lr),
        (torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95)), recipe.adamw_lr),
    ]
    source = batches(examples, rng, recipe.tokens_per_step)
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as lines:
        for step in (bar := tqdm(range(recipe.steps), desc=log.parent.name)):
            batch = next(source)
            num_scored = sum(len(ids) - prompt for ids, prompt in batch)
            loss = summed_loss(model, batch) / num_scored
            torch.autograd.backward(loss)
            decay = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
            scale = min(1.0, (step + 1) / recipe.warmup_steps, decay)
            for optimizer, peak in optimizers:
                optimizer.param_groups[0]["lr"] = peak * scale
                optimizer.step()
                optimizer.zero_grad()
            if step % 10 == 0 or step == recipe.steps - 1:
                seconds = round(time.monotonic() - begun, 1)
                row = {"step": step, "loss": round(loss.item(), 4), "lr_scale": round(scale, 3)}
                lines.write(json.dumps(row | {"seconds": seconds}) + "\n")
                lines.flush()
                bar.set_postfix(loss=f"{loss.item():.3f}")


@click.command(help="Train the pocket student and teacher.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("pipelines/pocket/models"))
@click.option("--only", type=click.Choice(["student", "teacher"]), help="Train one of the two.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, only: str | None, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    for role in ("student", "teacher") if only is None else (only,):
        folder = out / role
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"{role} {seed}")
        torch.manual_seed(seed)
        recipe = STUDENT if role == "student" else TEACHER
        model = build_model(recipe, tokenizer)
        examples = solving(tokenizer, rng, recipe.slip_rate)
        if role == "teacher":
            student, _ = load(out / "student")
            grow(student, model)
            rollouts = solve(student, tokenizer, rng, "pretrain", NUM_STUDENT_DRAFTS, 1.0)
            drafts = [rollout for rollout in rollouts if rollout.ended]
            examples = evenly(rng, examples, rewriting(tokenizer, rng, drafts))
        log = folder / "train_log.jsonl"
        train(model, recipe, examples, rng, log)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved, _ = load(folder)
        solved = solve(saved, tokenizer, rng, "validation", NUM_CHECKED, temperature=0.0)
        row = {
            "num_problems": NUM_CHECKED,
            "greedy_accuracy": round(sum(one.right for one in solved) / NUM_CHECKED, 4),
            "mean_tokens": round(sum(one.num_tokens for one in solved) / NUM_CHECKED, 1),
        }
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
