"""Stage two of Mixed-Policy Distillation: train the student on a round's rewrites.

    from mpd_train import TrainConfig, train

    train(TrainConfig(shards=["data/round1"], student="student", out="runs/round1"))

These names are public, and those of `mpd_train.kl`; all other modules may change. A name is loaded
when it is first used, so that `import mpd_train` stays fast and free of torch.
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from mpd_train.config import (
        LoraConfig,
        LossConfig,
        OptimizerConfig,
        TrainConfig,
        ValidationConfig,
    )
    from mpd_train.export import export_checkpoint
    from mpd_train.loop import train

__all__ = [
    "LoraConfig", "LossConfig", "OptimizerConfig", "TrainConfig", "ValidationConfig",
    "export_checkpoint", "train",
]  # fmt: skip

_MODULES = {"export_checkpoint": "export", "train": "loop"}


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "config")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
