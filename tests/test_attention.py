"""Attention for packs, and where a training may have it.

torch's kernels for packs run on CUDA alone: `python -m pytest --noconftest -m gpu
tests/test_attention.py`.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from mpd_data.common.errors import ConfigError
from mpd_data.common.models import ModelFiles, resolve_model
from mpd_train.config import TrainConfig
from mpd_train.model.attention import attention, boundaries, is_short
from mpd_train.model.causal_lm import CausalLM
from mpd_train.model.device import autocast


def config(**changed):
    return TrainConfig(shards=[Path("round1")], student="student", out=Path("run"), **changed)


def test_boundaries_are_where_positions_begin_again():
    lengths = [3, 1, 7, 2]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = boundaries(positions)
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 11, 13]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["max_length_q"] == found["max_length_k"] == 7


def test_a_cpu_computes_each_sequence_alone_in_bfloat16():
    cpu = torch.device("cpu")
    assert attention(config(), cpu, torch.bfloat16, []) == "varlen"
    settings = {
        "float32": (config(), torch.float32),
        "compiled": (config(compile=True), torch.bfloat16),
    }
    for taken, dtype in settings.values():
        assert attention(taken, cpu, dtype, []) is None
        with pytest.raises(ConfigError, match="varlen: runs in bfloat16 alone, .* --compile"):
            changed = taken.model_copy(update={"attn_implementation": "varlen"})
            attention(changed, cpu, dtype, [])
    for dtype in (torch.float32, torch.bfloat16):
        assert attention(config(attn_implementation="eager"), cpu, dtype, []) == "eager"
    assert is_short("varlen") and is_short("flash_attention_2")
    assert not is_short("sdpa") and not is_short(None)


def test_a_soft_cap_is_not_left_out(tmp_path):
    """transformers' default silently leaves it out."""
    cpu = torch.device("cpu")
    gemma2(attn_logit_softcapping=1.0).save_pretrained(tmp_path / "capped")
    gemma2(attn_logit_softcapping=None).save_pretrained(tmp_path / "plain")
    capped, plain = (resolve_model(str(tmp_path / name)) for name in ("capped", "plain"))
    for models in ([capped], [plain, capped]):
        assert attention(config(), cpu, torch.float32, models) == "eager"
        with pytest.raises(ConfigError, match=f"sdpa: leaves out .*{capped.name}.*give eager"):
            attention(config(attn_implementation="sdpa"), cpu, torch.float32, models)
    assert attention(config(), cpu, torch.float32, [plain]) is None
    ids = torch.arange(1, 40)[None]

    def states(name):
        return CausalLM(capped, cpu, torch.float32, False, name).states(ids, None)

    exact = Gemma2ForCausalLM.from_pretrained(
        tmp_path / "capped", attn_implementation="eager"
    ).model(ids).last_hidden_state  # fmt: skip
    assert torch.equal(states(attention(config(), cpu, torch.float32, [capped])), exact)
    # Newer releases of transformers refuse it.
    with contextlib.suppress(ConfigError):
        assert not torch.allclose(states("sdpa"), exact, rtol=1e-2, atol=1e-2)


def gemma2(**changed):
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=1.0,
            **changed,
        )
    )  # fmt: skip


ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
@pytest.mark.parametrize("window", [None, 100])
def test_varlen_sees_each_sequence_by_itself(tmp_path, window, device):
    """Packed, in bfloat16, as far from float32 as sdpa in bfloat16 with one sequence at a time."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    device = torch.device(device)
    torch.manual_seed(0)
    sliding = {} if window is None else {
        "use_sliding_window": True, "sliding_window": window, "max_window_layers": 0,
    }  # fmt: skip
    settings = Qwen3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=1024, **sliding,
    )  # fmt: skip
    Qwen3ForCausalLM(settings).save_pretrained(tmp_path)
    files = ModelFiles("made", tmp_path, "made", 1024, 4096)
    lengths = [1, 700, 33, 290]
    ids = torch.randint(0, 1024, (1, sum(lengths)), device=device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    weights = torch.randn(ids.shape[1], 128, device=device)

    def results(name, dtype, parts):
        model = CausalLM(files, device, torch.float32, False, name)
        cuts = [sum(lengths)] if parts == 1 else lengths
        with autocast(device, dtype):
            pairs = zip(ids.split(cuts, 1), positions.split(cuts, 1), strict=True)
            states = torch.cat([model.states(*pair) for pair in pairs], 1)
        (states[0].float() * weights).sum().backward()
        return states.detach().float(), model.model.get_input_embeddings().weight.grad

    def error(found, exact):
        return max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)
        )  # fmt: skip

    name = attention(config(attn_implementation="varlen"), device, torch.bfloat16, [files])
    exact = results("sdpa", torch.float32, len(lengths))
    usual = error(results("sdpa", torch.bfloat16, len(lengths)), exact)
    assert usual < 0.03
    assert error(results(name, torch.bfloat16, 1), exact) < 1.5 * usual
