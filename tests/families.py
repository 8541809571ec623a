"""Model families with tiny random weights, sampled and scored by an engine and trained on.

    python tests/families.py            run all families and rewrite the table in docs/engines.md
    python tests/families.py Llama …    run these and print their lines

Random weights of large scale give distributions that a wrong position, window, norm or head changes
by whole nats.
"""

import functools
import multiprocessing
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from mpd_data.common.errors import EngineError, MPDError
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.protocol import Completion
from mpd_data.engines.scores import score_columns
from mpd_data.engines.start import start_engine
from mpd_train.config import LossConfig
from mpd_train.data.batches import Batch
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM
from mpd_train.self_check import _compare

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "pipelines" / "pocket" / "models" / "student"
PAGE = ROOT / "docs" / "engines.md"
VOCAB, CONTEXT = 165, 512
# vLLM's attention on a CPU wants heads of 32.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.3,
    "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 16, "long_factor": [1 + i / 2 for i in range(16)],
}  # fmt: skip


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)
LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
# By the line's name: the class, what is special, other settings.
FAMILIES = {
    "Llama": ("Llama", "untied", {}),
    "Llama 3": ("Llama", "llama3 rotary scaling, two end tokens",
                LLAMA3 | {"eos_token_id": [2, 7]}),
    "Llama, linear": ("Llama", "linear rotary scaling", rope("linear", factor=4.0)),
    "Llama, dynamic": ("Llama", "dynamic NTK", rope("dynamic", factor=4.0)),
    "Llama, YaRN": ("Llama", "YaRN", YARN),
    "Llama, biased": ("Llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    "Llama, tied": ("Llama", "tied embeddings", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", "sliding window", {"sliding_window": 16}),
    "Ministral": ("Ministral", "sliding and full layers", {
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "Mixtral": ("Mixtral", "experts", {"num_local_experts": 4}),
    "Qwen2": ("Qwen2", "biased attention", {}),
    "Qwen2, sliding": ("Qwen2", "sliding window", WINDOW),
    "Qwen2, YaRN": ("Qwen2", "YaRN", YARN),
    "Qwen3": ("Qwen3", "norms of queries and keys, tied", {"tie_word_embeddings": True}),
    "Qwen2-MoE": ("Qwen2Moe", "experts, a shared one",
                  EXPERTS | {"shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": ("Qwen3Moe", "experts", EXPERTS),
    "Gemma": ("Gemma", "norms from 1, scaled embedding", {}),
    "Gemma 2": ("Gemma2", "soft caps, sliding window", {
        "sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0}),
    "Gemma 3": ("Gemma3Text", "sliding window, two rotary bases", {
        "sliding_window": 16, "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "Phi": ("Phi", "partial rotary, biased head", {}),
    "Phi-3": ("Phi3", "joined weights, sliding window", {"sliding_window": 16}),
    "Phi-3, LongRoPE": ("Phi3", "LongRoPE", {
        "rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "Granite": ("Granite", "scales of embedding, residual, attention, logits", {
        "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.1}),
    "Granite-MoE": ("GraniteMoe", "experts, scales", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0,
        "attention_multiplier": 0.1}),
    "Cohere": ("Cohere", "parallel layers, scaled logits", {"logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", "sliding layers, others without positions", {
        "logit_scale": 0.25, "sliding_window": 16}),
    "OLMo": ("Olmo", "norms without weights", {}),
    "OLMo 2": ("Olmo2", "norms after layers", {}),
    "OLMo 3": ("Olmo3", "norms after layers, sliding window", {"sliding_window": 16}),
    "OLMoE": ("Olmoe", "experts", {"num_experts": 4, "num_experts_per_tok": 2}),
    "StableLM": ("StableLm", "partial rotary", {}),
    "SmolLM3": ("SmolLM3", "some layers without positions", {"no_rope_layer_interval": 2}),
    "GLM-4": ("Glm4", "partial rotary, four norms", {}),
    "GPT-NeoX": ("GPTNeoX", "parallel layers, partial rotary", {"num_key_value_heads": 2}),
    "Starcoder 2": ("Starcoder2", "biases, plain layer norms", {"sliding_window": None}),
    "Nemotron": ("Nemotron", "norms from 1, squared ReLU", {}),
    "EXAONE 4": ("Exaone4", "sliding and full layers", {"sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "ERNIE 4.5": ("Ernie4_5", "interleaved rotary", {}),
    "Seed-OSS": ("SeedOss", "biased attention", {}),
    "gpt-oss": ("GptOss", "experts, sinks, sliding window", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "Llama 4": ("Llama4Text", "attention in chunks", {
        "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 96}),
    "Mamba": ("Mamba", "state space, no positions", {"state_size": 8}),
    "RWKV": ("Rwkv", "recurrent, no positions", {"attention_hidden_size": 64}),
}  # fmt: skip


def make(name, folder):
    """Write a model of the family with random weights, and the pocket tokenizer."""
    kind, _, changed = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changed})
    names = (f"{kind}ForCausalLM", f"{kind.removesuffix('Text')}ForCausalLM")
    model = next(getattr(transformers, x) for x in names if hasattr(transformers, x))(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            # These begin at 0 or 1, which hides a wrong offset.
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(STUDENT / file, folder / file)
    return resolve_model(str(folder))


def sampled(files):
    """Return the engine's name, and rows: vLLM's where it runs the family here."""
    try:
        return "vLLM", rows_of(files, "vllm")
    except EngineError:
        return "transformers", rows_of(files, "transformers")


def rows_of(files, backend):
    """Return prompts, completions, their score columns and log-probabilities: short, long past
    every window, and up to the context."""
    settings = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_gib": 0.125, "backend": backend}
    with closing(start_engine(files, EngineConfig(**settings), max_logprobs=VOCAB)) as engine:
        ids = torch.randint(4, VOCAB, (3, 60), generator=torch.Generator().manual_seed(1)).tolist()
        prompts = {"short": ids[0][:5], "long": ids[1], "longest": ids[2][:40]}
        room = {"short": 20, "long": 50, "longest": min(engine.max_model_len, 200) - 41}
        for key, prompt in prompts.items():
            engine.submit_generate(key, prompt, SamplingConfig(max_tokens=room[key]), 7)
        rows = {}
        while engine.in_flight:
            for result in engine.step():
                if isinstance(result, Completion):
                    rows[result.key] = (prompts[result.key], result.token_ids)
                    engine.submit_score(result.key, *rows[result.key], VOCAB)
                else:
                    columns = score_columns(result, VOCAB, VOCAB)
                    rows[result.key] += (columns, result.target_logprobs)
    return list(rows.values())


def packed(rows):
    """Return one pack of all rows, as the trainer lays it out."""
    parts = {
        name: [] for name in ("ids", "positions", "places", "labels", "top", "logprobs", "tail")
    }
    start = 0
    for prompt, completion, columns, _ in rows:
        length, n = len(prompt) + len(completion), len(completion)
        parts["ids"].append(prompt + completion)
        parts["positions"].append(np.arange(length))
        parts["places"].append(start + len(prompt) - 1 + np.arange(n))
        parts["labels"].append(completion)
        parts["top"].append(columns["topk_ids"].reshape(n, VOCAB))
        parts["logprobs"].append(columns["topk_logprobs"].reshape(n, VOCAB).astype(np.float32))
        parts["tail"].append(columns["tail_logprobs"].astype(np.float32))
        start += length
    joined = {name: torch.from_numpy(np.concatenate(part)) for name, part in parts.items()}
    ids, positions = joined["ids"].long()[None], joined["positions"][None]
    places, labels = joined["places"], joined["labels"].long()
    n = len(labels)
    return Batch(
        ids, positions, places, labels, joined["top"].long(), joined["logprobs"], joined["tail"],
        ids, positions, places, torch.ones(n), torch.zeros(n),
    )  # fmt: skip


def self_kl(files: ModelFiles, rows):
    """Return the loss of the model on its own scores, in nats per token, before a step. Raise
    ConfigError where the trainer would, for the family or in its self-check."""
    batch = packed(rows)
    model = CausalLM(files, torch.device("cpu"), torch.float32, False)
    stored = torch.from_numpy(np.concatenate([logprobs for *_, logprobs in rows]))
    names = [f"row {i}" for i in range(len(rows))]
    setting = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, vocab_size=VOCAB)
    _compare(setting, model, batch, stored, names, "float32")
    output = pack_loss(model, None, batch, VOCAB, LossConfig(), float(len(batch.labels)))
    output.loss.backward()
    torch.optim.SGD(model.model.parameters(), lr=1e-6).step()
    return float(output.per_token.mean())


@functools.cache
def trainer():
    """A process without vLLM, which changes some of transformers' classes where it runs them."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def tried(name):
    """Return the table's cells of a family: who samples and scores, and the result."""
    with tempfile.TemporaryDirectory() as folder:
        engine = "none"
        try:
            files = make(name, Path(folder))
            engine, rows = sampled(files)
            value = trainer().submit(self_kl, files, rows).result()
        except MPDError as error:
            reason = str(error).replace(f"{folder}: ", "").replace(f"{folder}/", "")
            reason = reason.splitlines()[0].split(". ")[0].rstrip(".")
            if "other log-probabilities" in reason:
                reason = "by the self-check"
            return engine, f"refused: {reason}"
    return engine, "below 1e-5" if abs(value) < 1e-5 else f"{value:.2g}"


def line(name, engine, result):
    return f"| {name} | {FAMILIES[name][1]} | {engine} | {result} |"


def lines_of_page():
    """Return the table's lines in the documents, by family."""
    lines = re.findall(r"^\| .+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {text.split(" | ")[0].removeprefix("| "): text for text in lines}


def main(names):
    lines = {}
    for name in names or FAMILIES:
        lines[name] = line(name, *tried(name))
        print(lines[name], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    for name, old in lines_of_page().items():
        text = text.replace(old, lines.get(name, old))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
