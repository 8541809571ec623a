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
    """Return one completion of each (problem, user message). Temperature 0 is greedy. Prompts of
    similar length share a batch."""
    model.eval()
    torch.manual_seed(seed)
    end: int = tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    prompts = [prompt_ids(tokenizer, message) for _, message in messages]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    samples: dict[int, Sample] = {}
    for begin in tqdm(range(0, len(order), BATCH_SIZE), desc="generate", leave=False):
        batch = order[begin : begin + BATCH_SIZE]
        width = len(prompts[batch[-1]])
        padding = [width - len(prompts[index]) for index in batch]
        tokens = torch.tensor([[end] * n + prompts[i] for n, i in zip(padding, batch, strict=True)])
        results = model.generate(
            input_ids=tokens,
            attention_mask=(torch.arange(width) >= torch.tensor(padding)[:, None]).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=end,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        for index, ids in zip(batch, results[:, width:].tolist(), strict=True):
            ended = end in ids
            length = ids.index(end) if ended else len(ids)
            text = tokenizer.decode(ids[:length])
            samples[index] = Sample(messages[index][0], text, length + ended, ended)
    return [samples[index] for index in range(len(messages))]
