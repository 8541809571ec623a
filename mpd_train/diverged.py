"""A step whose loss means nothing: keep what it was made of, and say so."""

from safetensors.torch import save_file

from mpd_data.common.errors import MPDError
from mpd_train.config import TrainConfig
from mpd_train.data.batches import Batch
from mpd_train.data.shard_set import Pack, ShardSet
from mpd_train.distributed import Ranks


def diverged(
    config: TrainConfig, shards: ShardSet, step: int, packs: list[Pack], batches: list[Batch],
    loss: float, norm: float, ranks: Ranks,
) -> MPDError:  # fmt: skip
    """Save this process's `batches` of step `step`, from 1, a file for each pack; return the error
    that says so, and names the first 20 of the step's rows: FILE:ROW_GROUP:ROW."""
    folder = config.out / "failed" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    for index, batch in enumerate(batches):
        tensors = {name: x.cpu().contiguous() for name, x in vars(batch).items()}
        save_file(tensors, folder / f"rank-{ranks.rank}-pack-{index}.safetensors")
    places = [(shards.groups[g], r) for pack in packs for g, r in pack.rows][:20]
    rows = ", ".join(f"{group.path.name}:{group.index}:{row}" for group, row in places)
    # Until every process has saved its own: torchrun ends the others when one exits.
    ranks.wait()
    return MPDError(
        f"step {step}: loss {loss}, gradient norm {norm}; expected at most --max-loss"
        f" {config.max_loss:g} and finite gradients. Its batches are in {folder}, from these rows:"
        f" {rows}. The last checkpoint is from before it. Check the round with mpd-gen validate;"
        " for a lower --learning-rate give another --out or --overwrite."
    )
