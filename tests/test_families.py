"""Families that add to their logits, scale or cap them: the loss is that of what the model says."""

import json
import shutil

import families
import pytest
import torch
import transformers
from conftest import STUDENT, drained

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import resolve_model
from mpd_data.config import EngineConfig
from mpd_data.engines.start import start_engine
from mpd_train.config import LossConfig, TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.dryrun.plan import RoundAhead, plan_train_ahead
from mpd_train.loop import train
from mpd_train.loss import pack_loss
from mpd_train.model.causal_lm import CausalLM

CPU = torch.device("cpu")
VOCAB, K = 64, 8
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.5,
}  # fmt: skip
# Of its logits: what they are multiplied by, the cap.
FAMILIES = {
    "Llama": ({}, (1.0, None)),
    "Gemma2": ({"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0,
                "attn_logit_softcapping": None}, (1.0, 3.0)),
    "Granite": ({"logits_scaling": 4.0}, (0.25, None)),
    "Cohere": ({"logit_scale": 0.0625, "pad_token_id": 0}, (0.0625, None)),
    "Phi": ({}, (1.0, None)),
}  # fmt: skip


QUANTISED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


def made(family, folder, seed, **changed):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family][0] | changed))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        # Biases begin at 0.
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return CausalLM(resolve_model(str(folder)), CPU, torch.float32, False)


def logits_of(model, ids, vocab):
    return model.model(input_ids=ids).logits[0, :-1, :vocab]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_own_logits(tmp_path, family):
    """Value and every weight's gradient, from the cached top K and from a teacher in the process
    that has padding rows."""
    student = made(family, tmp_path / "student", 0)
    teacher = made(family, tmp_path / "teacher", 1, vocab_size=VOCAB + 8)
    assert (student.logit_scale, student.softcap) == FAMILIES[family][1]
    assert (student.bias() is not None) == (family == "Phi")
    ids = torch.randint(1, VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30)
    with torch.no_grad():
        log_p = logits_of(teacher, ids, VOCAB).log_softmax(-1)
    top = log_p.topk(K, dim=1)
    tail = log_p.scatter(1, top.indices, -torch.inf).logsumexp(1)
    # The last state predicts what is not there.
    chosen = positions[:-1]
    batch = Batch(
        ids, positions[None], chosen, ids[0, 1:], top.indices, top.values, tail,
        ids, positions[None], chosen, torch.ones(29), torch.zeros(29),
    )  # fmt: skip
    weights = [p for p in student.model.parameters() if p.requires_grad]
    for taught in (None, teacher):
        log_q = logits_of(student, ids, VOCAB).log_softmax(-1)
        exact = (log_p.exp() * (log_p - log_q)).sum(1)
        if taught is None:
            # Over the K buckets and the tail's.
            q_tail = log_q.scatter(1, top.indices, -torch.inf).logsumexp(1)
            exact = (top.values.exp() * (top.values - log_q.gather(1, top.indices))).sum(1)
            exact = exact + tail.exp() * (tail - q_tail)
        expected = torch.autograd.grad(exact.sum() / 29, weights)
        found = pack_loss(student, taught, batch, VOCAB, LossConfig(), 29.0)
        assert torch.allclose(found.per_token, exact, rtol=1e-4, atol=1e-5)
        for got, want in zip(torch.autograd.grad(found.loss, weights), expected, strict=True):
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-7


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_that_is_its_teacher_learns_nothing(tmp_path, family):
    student, teacher = (made(family, tmp_path / "model", 0) for _ in range(2))
    ids = torch.randint(1, VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30)
    nothing = torch.zeros(29, 1)
    batch = Batch(
        ids, positions[None], positions[:-1], ids[0, 1:], nothing.long(), nothing, nothing[:, 0],
        ids, positions[None], positions[:-1], torch.ones(29), torch.zeros(29),
    )  # fmt: skip
    found = pack_loss(student, teacher, batch, VOCAB, LossConfig(), 29.0)
    found.loss.backward()
    assert found.per_token.abs().max() <= 1e-6
    assert max(p.grad.abs().max() for p in student.model.parameters()) <= 1e-5


@pytest.mark.parametrize("family", ["Gemma2", "Granite"])
def test_the_engine_scores_what_is_trained(tmp_path, family):
    """vLLM's log-probabilities, from which a teacher's record is made, are those of the loss."""
    shutil.copytree(STUDENT, tmp_path / "model")
    # vLLM's attention on a CPU wants heads of 32.
    # With weights of 0.5 Granite's own float32 is 1.1e-4 from float64.
    sizes = {"hidden_size": 64, "vocab_size": 165, "initializer_range": 0.2}
    if family == "Gemma2":
        sizes |= {"head_dim": 32, "attn_logit_softcapping": 5.0}
    model = made(family, tmp_path / "model", 0, **sizes)
    settings = EngineConfig(dtype="float32", max_num_seqs=16, kv_cache_gib=0.25)
    engine = start_engine(resolve_model(str(tmp_path / "model")), settings, max_logprobs=K)
    ids = list(range(3, 60))
    engine.submit_score("one", ids[:20], ids[20:], K)
    scores = drained(engine)["one"]
    engine.close()
    attention = "eager" if family == "Gemma2" else None
    files = model.files
    model = CausalLM(files, CPU, torch.float32, False, attention)
    with torch.no_grad():
        logits = model.states(torch.tensor([ids]), None)[0, 19:-1] @ model.head().T
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    exact = logits.log_softmax(-1).topk(K, dim=1)
    assert (torch.from_numpy(scores.topk_logprobs) - exact.values).abs().max() <= 1e-4
    assert (torch.from_numpy(scores.topk_ids) == exact.indices).all()


def test_an_attention_that_is_refused_claims_no_folder(tmp_path, round_dir):
    """The advice, to leave the option out, would be refused as another setting."""
    shutil.copytree(STUDENT, tmp_path / "model")
    more = {"vocab_size": 165, "head_dim": 16, "attn_logit_softcapping": 5.0}
    made("Gemma2", tmp_path / "model", 0, **more)
    settings = {
        "shards": [round_dir], "student": str(tmp_path / "model"), "out": tmp_path / "run",
        "max_steps": 1, "pack_length": 600,
    }  # fmt: skip
    refused = TrainConfig(**settings, attn_implementation="sdpa")
    of_teacher = refused.model_copy(
        update={"student": str(STUDENT), "teacher": settings["student"]}
    )
    for config in (refused, of_teacher):
        with pytest.raises(ConfigError, match="leaves out the soft cap"):
            train(config)
    train(TrainConfig(**settings))
    assert (tmp_path / "run" / "model").is_dir()


def test_logits_that_come_otherwise_are_refused(tmp_path):
    """A cap under a name that is not known: training without it would be silently wrong."""
    config = transformers.RecurrentGemmaConfig(
        **SIZES, num_key_value_heads=1, head_dim=16, lru_width=32, logits_soft_cap=0.5,
        attention_window_size=16, max_position_embeddings=128,
    )  # fmt: skip
    transformers.RecurrentGemmaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="logits are not .* not supported"):
        CausalLM(resolve_model(str(tmp_path)), CPU, torch.float32, False)


def test_a_declared_cap_counts_where_it_cannot_be_seen_yet(tmp_path):
    """Logits that are small against it: when they have grown it matters."""
    student = made("Gemma2", tmp_path, 0, final_logit_softcapping=300.0)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        plain = student.states(ids, None) @ student.head().T
        assert torch.allclose(plain, student.model(input_ids=ids).logits, rtol=1e-2, atol=1e-2)
    assert student.softcap == 300.0


def test_a_scale_near_one_is_not_taken_for_none(tmp_path):
    assert made("Granite", tmp_path, 0, logits_scaling=1.015).logit_scale == 1 / 1.015


def test_the_plan_of_a_round_to_come_refuses_what_the_training_would(tmp_path):
    made("Gemma2", tmp_path / "capped", 0, attn_logit_softcapping=5.0)
    made("Llama", tmp_path / "quantised", 0)
    file = tmp_path / "quantised" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"text_config": values | QUANTISED}))
    for name, more, message in (
        ("capped", {"attn_implementation": "sdpa"}, "soft cap"),
        ("quantised", {}, r"quantised model \(gptq\)"),
    ):
        files = resolve_model(str(tmp_path / name))
        config = TrainConfig(
            shards=[tmp_path / "round1"], student=files.name, out=tmp_path / "run", **more
        )
        with pytest.raises(ConfigError, match=message):
            plan_train_ahead(config, files, RoundAhead("", "problem", 10, 1000, 50, 50, None), None)


# One of each kind. `python tests/families.py` tries all.
CHOICE = (
    "Llama 3", "Qwen2, sliding", "Gemma 2", "Phi-3, LongRoPE", "Cohere 2", "Qwen3-MoE", "Mamba",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICE)
def test_engine_and_trainer_are_one_model(name):
    """As the table in the documents says: the student's loss on its own drafts and scores is 0."""
    assert families.line(name, *families.tried(name)) == families.lines_of_page()[name]


def test_the_table_has_each_family_and_no_other_result():
    page = families.lines_of_page()
    assert len(families.FAMILIES) >= 25
    for name in families.FAMILIES:
        assert page[name].endswith("| below 1e-5 |") or "| refused: " in page[name]
