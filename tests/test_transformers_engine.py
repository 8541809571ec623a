"""The second engine: the same protocol, scores equal to vLLM's, samples equal in law."""

import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import STUDENT, drained, python, rewrite_arguments, rollout_arguments, rows, run
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import load_tokenizer, resolve_model
from mpd_data.config import EngineConfig, SamplingConfig
from mpd_data.engines.protocol import RequestError
from mpd_data.engines.start import start_engine
from mpd_data.prompts.chat import ChatFormatter
from mpd_data.store.round import RoundDir
from mpd_data.store.shards import read_metadata


def start(**settings):
    settings = {"backend": "transformers", "dtype": "float32", "max_num_seqs": 16, **settings}
    return start_engine(resolve_model(str(STUDENT)), EngineConfig(**settings))


@pytest.fixture(scope="module")
def engine():
    return start()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt_ids(round_dir):
    """Prompts of unlike lengths, and one made long by a second problem."""
    problems = rows(round_dir)["problem"].unique(maintain_order=True).to_list()
    formatter = ChatFormatter(load_tokenizer(resolve_model(str(STUDENT))))
    found = [formatter.render(problem)[1] for problem in problems[:20]]
    return [*found, formatter.render(" ".join(problems[:2]))[1]]


def sample(engine, prompt_ids, indices, sampling, seed=100):
    for i in indices:
        engine.submit_generate(str(i), prompt_ids[i], sampling, seed + i)
    return {key: (r.token_ids, r.finish_reason) for key, r in drained(engine).items()}


def test_rows_do_not_depend_on_order_batch_or_company(engine, prompt_ids):
    """Batches end at half, and the rest goes on beside others: no row may notice."""
    sampling = SamplingConfig(max_tokens=120, top_p=0.95)
    everyone = range(len(prompt_ids))
    together = sample(engine, prompt_ids, everyone, sampling)
    assert sample(engine, prompt_ids, reversed(everyone), sampling) == together
    assert sample(start(max_num_seqs=3), prompt_ids, everyone, sampling) == together
    assert sample(engine, prompt_ids, [4], sampling)["4"] == together["4"]
    assert len({len(ids) for ids, _ in together.values()}) > 5
    assert sample(engine, prompt_ids, everyone, sampling, seed=999) != together
    reasons = {reason for _, reason in together.values()}
    assert reasons == {"stop", "length"}
    for ids, reason in together.values():
        assert (ids[-1] == 2) == (reason == "stop")
        assert 2 not in ids[:-1]
        assert reason == "stop" or len(ids) == 120


def test_samples_follow_the_distribution(model, prompt_ids):
    """Frequencies of a token over 3,000 seeds against the exact probabilities after temperature,
    top-k, top-p and min-p (chi-square)."""
    # Hotter than the settings allow: the student is sure of most tokens.
    given = {"max_tokens": 1, "temperature": 6.0, "top_k": 12, "top_p": 0.97, "min_p": 0.041}
    settings = SamplingConfig.model_construct(**given)
    n = 3000
    engine = start(max_num_seqs=500)
    for seed in range(n):
        engine.submit_generate(str(seed), prompt_ids[0], settings, seed)
    counts = np.zeros(model.config.vocab_size)
    for result in drained(engine).values():
        counts[result.token_ids[0]] += 1
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids[0]])).logits[0, -1].double()
    exact = _kept(logits / 6.0, top_k=12, top_p=0.97, min_p=0.041)
    assert (counts[exact == 0] == 0).all()
    expected = n * exact[exact > 0]
    assert len(expected) >= 8
    statistic = ((counts[exact > 0] - expected) ** 2 / expected).sum()
    # By chance its mean is len - 1 and its deviation sqrt(2 (len - 1)).
    assert statistic < len(expected) + 4 * np.sqrt(2 * len(expected))


def _kept(logits, top_k, top_p, min_p):
    """Probabilities after top-k, then top-p of what is left, then min-p."""
    probabilities = logits.softmax(-1).numpy()
    order = np.argsort(-probabilities)[:top_k]
    kept = probabilities[order] / probabilities[order].sum()
    inside = (np.cumsum(kept) - kept < top_p) & (kept >= min_p * kept[0])
    exact = np.zeros_like(probabilities)
    exact[order[inside]] = kept[inside] / kept[inside].sum()
    return exact


def test_scores_equal_transformers_in_any_batching(model, prompt_ids):
    """Sequences of unlike lengths together, whole and in slices of a few positions."""
    rng = np.random.default_rng(0)
    cases = {
        str(i): (ids, rng.integers(4, 160, size=int(rng.integers(1, 60))).tolist())
        for i, ids in enumerate(prompt_ids[:9])
    }
    for budget in (None, 40, 7):
        engine = start(max_num_batched_tokens=budget, max_num_seqs=4)
        for key, (context, target) in cases.items():
            engine.submit_score(key, context, target, 8)
        found = drained(engine)
        assert found.keys() == cases.keys()
        for key, (context, target) in cases.items():
            with torch.no_grad():
                logits = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
            exact = logits.double().log_softmax(-1).numpy()
            scores = found[key]
            assert scores.topk_ids.shape == scores.topk_logprobs.shape == (len(target), 8)
            assert scores.topk_ids.dtype == np.int32
            at = np.arange(len(target))
            assert np.abs(scores.target_logprobs - exact[at, target]).max() <= 1e-4
            gathered = np.take_along_axis(exact, scores.topk_ids.astype(np.int64), 1)
            assert np.abs(scores.topk_logprobs - gathered).max() <= 1e-4
            assert np.abs(scores.topk_logprobs + np.sort(-exact, 1)[:, :8]).max() <= 1e-4


def test_a_soft_cap_of_attention_is_not_left_out(tmp_path):
    """transformers' default attention would silently give other scores than vLLM's."""
    config = AutoConfig.from_pretrained(STUDENT)
    shutil.copytree(STUDENT, tmp_path / "model")
    torch.manual_seed(0)
    Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=config.vocab_size, hidden_size=32, intermediate_size=32, head_dim=16,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, eos_token_id=2,
            attn_logit_softcapping=1.0, initializer_range=1.0,
        )
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    settings = EngineConfig(backend="transformers", dtype="float32")
    engine = start_engine(resolve_model(str(tmp_path / "model")), settings)
    ids = list(range(3, 60))
    engine.submit_score("one", ids[:20], ids[20:], 8)
    scores = drained(engine)["one"]
    exact, other = (
        Gemma2ForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=name)(
            torch.tensor([ids])
        ).logits[0, 19:-1].log_softmax(-1).gather(1, torch.tensor(ids[20:])[:, None])[:, 0].detach()
        for name in ("eager", "sdpa")
    )  # fmt: skip
    assert np.abs(scores.target_logprobs - exact.numpy()).max() <= 1e-3
    assert (other - exact).abs().max() > 0.1


def test_what_does_not_fit_is_refused_alone(engine, prompt_ids):
    short = SamplingConfig(max_tokens=3)
    engine.submit_generate("short", prompt_ids[0], short, 0)
    with pytest.raises(RequestError, match="no room"):
        engine.submit_generate("long", [5] * 5000, short, 0)
    with pytest.raises(RequestError, match="no room"):
        engine.submit_score("long", [5] * 4999, [6], 4)
    assert drained(engine).keys() == {"short"}


def test_settings_of_vllm_alone_are_refused():
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2"):
        start(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="--pipeline-parallel-size 2"):
        start(pipeline_parallel_size=2)


def test_no_vllm_is_needed(prompts, tmp_path):
    settings = {"--backend": "transformers", "--num-prompts": 2, "-n": 2}
    arguments = rollout_arguments(prompts, tmp_path / "r", **settings)
    code = (
        f"import sys; sys.modules['vllm'] = None; sys.argv[1:] = {arguments!r}\n"
        "from mpd_data.cli import main; main()"
    )
    python(code)
    assert rows(tmp_path / "r")["row_id"].n_unique() == 4
    (shard,) = RoundDir(tmp_path / "r").shard_paths("rollouts")
    assert read_metadata(shard)["backend"] == "transformers"


@pytest.mark.slow
def test_a_round_of_its_own_equals_vllms(round_dir, prompts, tmp_path):
    """The whole of stage one. Greedy rollouts are the same ids; sampled rewrites of vLLM's
    rollouts are kept alike; scores differ by rounding."""
    backend = {"--backend": "transformers"}
    greedy = {"--temperature": 0, "-n": 1, "--num-prompts": 30}
    out, vllm = tmp_path / "transformers", tmp_path / "vllm"
    run("mpd-gen", *rollout_arguments(prompts, out, **greedy, **backend))
    run("mpd-gen", *rollout_arguments(prompts, vllm, **greedy))
    ours, theirs = rows(out), rows(vllm)
    same = ours["completion_ids"] == theirs["completion_ids"]
    # A tie within rounding may be broken the other way, rarely.
    assert same.mean() > 0.95
    assert ours["finish_reason"].equals(theirs["finish_reason"])

    # Either engine goes on with what the other began.
    run("mpd-gen", *rewrite_arguments(vllm))
    run("mpd-gen", *rewrite_arguments(out, **backend))
    run("mpd-gen", "validate", out)
    assert "0 rows new" in run("mpd-gen", *rewrite_arguments(out)).stderr
    ours, theirs = rows(out, "distill"), rows(vllm, "distill")
    both = ours.join(theirs, on="row_id").filter(
        (pl.col("status") == "ok") & (pl.col("input_ids") == pl.col("input_ids_right"))
    )
    assert both.height > 0.9 * theirs.filter(pl.col("status") == "ok").height > 10
    for row in both.to_dicts():
        assert row["teacher_prompt_ids"] == row["teacher_prompt_ids_right"]
        ours_, theirs_ = (np.array(row[c]) for c in ("topk_logprobs", "topk_logprobs_right"))
        # float16 rounding, and float32's in the last place before it.
        assert (np.abs(ours_ - theirs_) <= 2**-10 * np.abs(theirs_) + 1e-4).all()
