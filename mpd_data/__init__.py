"""Stage one of Mixed-Policy Distillation: sample traces, rewrite them, look at the result.

    from mpd_data import RewriteConfig, RolloutsConfig, run_rewrite, run_rollouts, scan_round

    run_rollouts(RolloutsConfig(model="student", prompts=["train.jsonl"], out="data/round1"))
    run_rewrite(RewriteConfig(teacher="teacher", shards="data/round1"))
    scan_round("data/round1", "distill").filter(status="ok").collect()

These names are public; all other modules may change. A name is loaded when it is first used, so
that `import mpd_data` stays fast and free of torch.
"""

import importlib
import typing

from mpd_data.common.version import __version__ as __version__

if typing.TYPE_CHECKING:
    from mpd_data.checkers.formats import Checker
    from mpd_data.common.errors import ConfigError, DataError, EngineError, MPDError
    from mpd_data.config import (
        CheckConfig,
        EngineConfig,
        FailureConfig,
        FilterConfig,
        OutputConfig,
        PartsConfig,
        RewriteConfig,
        RewriteSamplingConfig,
        RolloutsConfig,
        SamplingConfig,
    )
    from mpd_data.inspect.compare import compare
    from mpd_data.inspect.stats import round_stats, scan_round
    from mpd_data.rewrite import run_rewrite
    from mpd_data.rollouts import run_rollouts
    from mpd_data.stage import Outcome

__all__ = [
    "CheckConfig", "Checker", "ConfigError", "DataError", "EngineConfig", "EngineError",
    "FailureConfig", "FilterConfig", "MPDError", "Outcome", "OutputConfig", "PartsConfig",
    "RewriteConfig", "RewriteSamplingConfig", "RolloutsConfig", "SamplingConfig", "compare",
    "round_stats", "run_rewrite", "run_rollouts", "scan_round",
]  # fmt: skip

_MODULES = {
    "Checker": "checkers.formats",
    "Outcome": "stage",
    "compare": "inspect.compare",
    "round_stats": "inspect.stats",
    "run_rewrite": "rewrite",
    "run_rollouts": "rollouts",
    "scan_round": "inspect.stats",
    **dict.fromkeys(("ConfigError", "DataError", "EngineError", "MPDError"), "common.errors"),
}


def __getattr__(name: str) -> typing.Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "config")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
