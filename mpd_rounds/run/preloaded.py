"""What the stages of a pipeline import, for the process that they are forks of."""

import contextlib
import gc
import importlib
import signal

from mpd_data.engines.vllm import prepare_environment

_MODULES = (
    "vllm.entrypoints.llm",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "mpd_data.rollouts",
    "mpd_data.select.refilter",
    "mpd_train.loop",
)

# Told to end with all others of its group, it lasts as long as the stages do that commit then.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
prepare_environment(on_cpu=True)
for module in _MODULES:
    # A stage imports it again, and says itself what is wrong; other engines do without vLLM.
    with contextlib.suppress(Exception):
        importlib.import_module(module)
# What is there now lives as long as each of the forks: they need neither look through it for
# garbage nor copy it for having looked.
gc.freeze()
