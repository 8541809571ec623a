"""Sample from the pocket models in batches with transformers, and judge what they write."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from pipelines.pocket.tokenizer import prompt_ids
from pipelines.pocket.world import Problem

BATCH_SIZE = 128
MAX_NEW_TOKENS = 500
TEMPLATE = tomllib.loads(Path(__file__).with_name("rewrite.toml").read_text("utf-8"))
_TRACE = re.compile(TEMPLATE["output"], re.DOTALL)


def rewrite_prompt(problem_text: str, draft: str) -> str:
    """Return the user message that asks the teacher for a rewrite."""
    prompt: str = TEMPLATE["prompt"]
    return prompt.replace("{{problem}}", problem_text).replace("{{draft}}", draft)


@torch.inference_mode()
def _generate_batch(
    model: Qwen3ForCausalLM,
    prompts: list[list[int]],
    temperature: float,
    generator: torch.Generator,
    end: int,
) -> list[list[int]]:
    """Return one completion of each prompt, both as token ids, from one batch padded on the left.

    Rows that have ended leave the batch every 16 tokens: traces differ in length by a factor of
    ten, so most of the batch would otherwise wait for the longest row.
    """
    width = max(len(ids) for ids in prompts)
    tokens = torch.tensor([[end] * (width - len(ids)) + ids for ids in prompts])
    lengths = torch.tensor([len(ids) for ids in prompts])
    mask = (torch.arange(width) >= width - lengths[:, None]).long()  # [rows, width]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    completions: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which completion each row of the batch writes
    for count in range(1, MAX_NEW_TOKENS + 1):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [rows, vocabulary]
        if temperature > 0:
            probs = torch.softmax(logits / temperature, dim=-1)
            tokens = torch.multinomial(probs, 1, generator=generator)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
            completion = completions[row]
            if not completion or completion[-1] != end:
                completion.append(token)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if count % 16 == 0:
            alive = [index for index, row in enumerate(rows) if completions[row][-1] != end]
            if not alive:
                break
            rows = [rows[index] for index in alive]
            remaining = torch.tensor(alive)
            tokens, positions, mask = tokens[remaining], positions[remaining], mask[remaining]
            cache.batch_select_indices(remaining)
    return completions


def generate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    *,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Return one completion of each prompt, as token ids with the end token if there is one.

    Temperature 0 is greedy. Prompts of similar length share a batch.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    end: int = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    for begin in tqdm(range(0, len(order), BATCH_SIZE), desc="generate", leave=False):
        batch = order[begin : begin + BATCH_SIZE]
        chosen = [prompts[index] for index in batch]
        results = _generate_batch(model, chosen, temperature, generator, end)
        for index, ids in zip(batch, results, strict=True):
            completions[index] = ids
    return completions


@dataclass(frozen=True)
class Sample:
    """A completion for one problem, and whether it is correct."""

    problem: Problem
    text: str  # without the end token
    num_tokens: int  # with it
    ended: bool

    @property
    def well_formed(self) -> bool:
        return self.ended and _TRACE.fullmatch(self.text) is not None

    @property
    def right(self) -> bool:
        return self.well_formed and self.text.endswith(f" answer {self.problem.answer}")


def load(folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[tuple[Problem, str]],
    temperature: float,
    seed: int = 0,
) -> list[Sample]:
    """Return one completion of each (problem, user message)."""
    completions = generate(
        model,
        tokenizer,
        [prompt_ids(tokenizer, message) for _, message in messages],
        temperature=temperature,
        seed=seed,
    )
    samples = []
    for (problem, _), ids in zip(messages, completions, strict=True):
        ended = ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids[:-1] if ended else ids)
        samples.append(Sample(problem, text, len(ids), ended))
    return samples
