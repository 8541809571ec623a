"""The FLOPs that MFU counts are those of the products that run."""

import pytest
import torch
from conftest import STUDENT, TEACHER
from torch.utils.flop_counter import FlopCounterMode

from mpd_data.common.models import resolve_model
from mpd_train.config import LoraConfig, LossConfig
from mpd_train.data.batches import load_pack
from mpd_train.data.packing import make_packs
from mpd_train.data.shard_set import ShardSet
from mpd_train.flops import peak_flops, step_flops
from mpd_train.loss import pack_loss
from mpd_train.model import lora
from mpd_train.model.causal_lm import CausalLM

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["cached", "teacher", "adapters"])
def test_a_step_has_the_flops_that_torch_counts(round_dir, kind):
    shards = ShardSet([round_dir])
    pack = make_packs(shards, 200, 0, 0)[0]
    batch = load_pack(shards, pack)
    student = CausalLM(resolve_model(str(STUDENT)), CPU, torch.float32, False, "eager")
    teacher = None
    if kind == "teacher":
        teacher = CausalLM(resolve_model(str(TEACHER)), CPU, torch.float32, False, "eager")
        teacher.model.requires_grad_(False)
    if kind == "adapters":
        lora.attach(student.model, student.files, LoraConfig(lora_r=8), None, 0)
    student.model.train()
    vocab_size = int(shards.metadata["vocab_size"])
    with FlopCounterMode(display=False) as counter:
        loss = pack_loss(student, teacher, batch, vocab_size, LossConfig(), 1.0).loss
        loss.backward()

    lengths = shards.lengths_of([pack])
    assert sum(lengths) == pack.num_tokens
    flops = step_flops(student, teacher)
    counted = flops.total(pack.num_loss_tokens, lengths)
    # Eager attention computes the whole square of the pack, of which half of each sequence's own is
    # wanted.
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    counted += flops.per_pair * (pack.num_tokens**2 - pairs)
    if teacher is not None:
        # Its sequences are longer here, with the instructions that it rewrote by.
        alone, tokens = step_flops(student, None), batch.teacher_input_ids.shape[1]
        assert tokens > pack.num_tokens
        counted += (flops.per_pair - alone.per_pair) * (tokens**2 - pack.num_tokens**2)
        counted += (flops.per_token - alone.per_token) * (tokens - pack.num_tokens)
    if kind == "adapters":
        # Where the embedding is frozen, what the first layer takes in needs no gradient.
        attention = student.model.model.layers[0].self_attn
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            ahead = part.base_layer.weight.numel() + part.lora_A["default"].weight.numel()
            counted -= 2 * ahead * pack.num_tokens
    assert counter.get_total_flops() == counted


def test_mixtures_of_experts_have_no_count():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
        num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    mixture = CausalLM.__new__(CausalLM)
    mixture.model = Qwen3MoeForCausalLM(config)
    assert step_flops(mixture, None) is None


def test_a_cpu_has_no_peak():
    assert peak_flops(CPU, torch.bfloat16) is None
