"""The pipeline that `mpd-rounds --example pocket` runs: models small enough for two CPU cores.

Its files are pipelines/pocket of the repository. The wheel has the ones that it takes in this
package (`force-include` in pyproject.toml); a checkout finds them where they are.
"""

import importlib.util
import json
import shutil
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "pocket").is_dir():
    __path__.append(str(_HERE.parents[1] / "pipelines"))

NAMES = ("pocket",)
# Problems of each kind, as many as `python -m pipelines.pocket.prompts` writes.
_SIZES = {"train": 6000, "validation": 600, "test": 1200, "ood": 600}
_FILES = ("models/student", "models/teacher", "rewrite.toml", "pipeline.toml")


def write(folder: Path) -> Path:
    """Write the example into `folder`: models, prompts, template, pipeline. Return the pipeline's
    path. What exists stays as it is, so an edited file is used.

    The pipeline's paths, relative to the repository, become paths in `folder`. Where there is no
    vLLM, its stages take the transformers engine.
    """
    prompts = importlib.import_module(f"{__name__}.pocket.prompts")
    source = Path(prompts.__file__ or "").parent
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "ood.jsonl").exists():  # the last that is written
        prompts.write(folder / "data", **_SIZES)
    for name in _FILES:
        target = folder / name
        if target.exists():
            continue
        partial = target.with_name(f".{target.name}.tmp")
        if target.suffix == ".toml":
            text = (source / name).read_text(encoding="utf-8")
            here = json.dumps(str(folder), ensure_ascii=False)[:-1]  # TOML's strings are JSON's
            text = text.replace('"pipelines/pocket/', f"{here}/")
            text = text.replace('"data/pocket/', f"{here}/data/")
            if importlib.util.find_spec("vllm") is None:
                text = text.replace("engine = {", 'engine = { backend = "transformers",')
            partial.write_text(text, encoding="utf-8")
        else:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial)
        partial.rename(target)
    return folder / "pipeline.toml"
