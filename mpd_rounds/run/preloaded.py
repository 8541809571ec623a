"""Import the libraries of all stages: the fork server preloads this module."""

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

# When the whole process group is terminated, the server outlives the stages, which still commit.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
prepare_environment(on_cpu=True)
for module in _MODULES:
    # vLLM is optional, and a stage that needs a module reports the error itself.
    with contextlib.suppress(Exception):
        importlib.import_module(module)
# The forks share these objects. Frozen, they are not scanned for garbage, which would copy their
# pages.
gc.freeze()
