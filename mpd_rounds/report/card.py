"""The data card: describes the distillation shards of a run to people who get them without it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.inspect.contamination import check_contamination
from mpd_data.inspect.stats import collect, scan
from mpd_data.store.round import RoundDir
from mpd_rounds.report.document import Block, Code, Paragraph, Table
from mpd_rounds.report.queries import Funnel
from mpd_rounds.report.run import Run, shard_metadata, stage_info

NOT_DECLARED = "not declared"
_MATCHES = 10  # pairs of similar prompts listed per evaluation set
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_LICENSE = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def data_card(run: Run, funnels: dict[int, Funnel]) -> Iterator[Block]:
    """Yield the data card of a run of mpd-rounds."""
    distilled = {n: folder for n, folder in run.rounds.items() if funnels[n].statuses}
    if not distilled:
        yield Paragraph("There are no rewrites yet, so there is no data to describe.")
        return
    metadata = {n: shard_metadata(folder, "distill") for n, folder in distilled.items()}
    kept = sum(funnels[n].kept for n in distilled)
    rows = sum(sum(funnels[n].statuses.values()) for n in distilled)
    yield Paragraph(
        f"{rows:,} rewrites from {len(distilled)} round{'s' * (len(distilled) > 1)}, {kept:,} of"
        f" them kept. A row is {_made(metadata)}. A kept row has the"
        f" {metadata[max(metadata)]['num_logprobs']} largest log-probabilities of each token, by"
        " the model that scored it. Rejected rows stay in the data, with the reason in the column"
        " status."
    )
    yield _counts(distilled, funnels)
    yield _sources(run, distilled)
    yield _licenses(run, metadata)
    yield _models(metadata)
    yield _templates(metadata)
    yield _filters(metadata)
    yield from _content(distilled)
    yield from contamination(run)
    yield Paragraph("To load it, with Polars:")
    yield Code(_loading(run.path), "python")


# Names of the models in a shard's metadata -> what they did.
_PARTS = {"student": "sampled by", "teacher": "rewritten and scored by"}


def _made(metadata: dict[int, dict[str, Any]]) -> str:
    if all(shard["template"]["name"] == "draft" for shard in metadata.values()):
        return "a model's solution as it was sampled, scored by a teacher"
    return "a model's solution, rewritten more concisely"


def _loading(path: Path) -> str:
    pattern = str(path / "data" / "round*" / "distill" / "*.parquet")
    return (
        f"import polars as pl\nkept = pl.scan_parquet({pattern!r})"
        '.filter(pl.col("status") == "ok").collect()'
    )


def _counts(distilled: dict[int, Path], funnels: dict[int, Funnel]) -> Table:
    rows = []
    for number, folder in distilled.items():
        frame = scan([folder], "distill")
        assert frame is not None
        tokens = collect(
            frame.filter(pl.col("status") == "ok").select(
                pl.col("num_rewritten_tokens").cast(pl.Int64).sum()
            )
        ).item()
        size = sum(f.stat().st_size for f in RoundDir(folder).shard_paths("distill"))
        funnel = funnels[number]
        rewrites = sum(funnel.statuses.values())
        cells = (funnel.prompts, funnel.rollouts, rewrites, funnel.kept, tokens)
        rows.append([f"round {number}", *(f"{n:,}" for n in cells), f"{size / 1e6:,.1f}"])
    head = ["", "prompts", "rollouts", "rewrites", "kept", "kept tokens", "MB"]
    return Table("Counts", head, rows)


def _sources(run: Run, distilled: dict[int, Path]) -> Table:
    rows = []
    for number, folder in distilled.items():
        rows.append([f"round {number}", *_source(folder)])
    for name, folders in run.evaluations.items():
        rows.append([f"evaluation {name}", *_source(folders[min(folders)])])
    head = ["used by", "files or data sets", "columns", "prompts' hash"]
    note = "The hash covers ids, texts and gold answers of the chosen prompts."
    return Table("Sources of the prompts", head, rows, left=4, note=note)


def _source(folder: Path) -> list[str]:
    info = stage_info(folder, "rollouts")
    config = info.get("details", {}).get("config", {})
    names = (config.get(name) for name in ("prompt_column", "answer_column", "id_column"))
    columns = [str(name) for name in (*names, *config.get("metadata_columns", [])) if name]
    return [
        ", ".join(map(str, config.get("prompts", []))) or "not recorded",
        ", ".join(columns),
        str(info.get("identity", {}).get("prompts", "not recorded")),
    ]


def _licenses(run: Run, metadata: dict[int, dict[str, Any]]) -> Table:
    declared = {k: v for k, v in run.settings.get("licenses", {}).items() if v}
    first = metadata[min(metadata)]
    # The pipeline says which model samples and which rewrites.
    whose = {
        "student": run.settings.get("sampler", "student"),
        "teacher": run.settings.get("rewriter", "teacher"),
    }
    rows = []
    for part, did in _PARTS.items():
        name = str(first[part]["name"])
        if whose[part] in declared:
            rows.append([did, name, declared[whose[part]], "the pipeline's [licenses]"])
        elif (own := license_of(Path(name))) is not None:
            rows.append([did, name, own, "the model's README.md"])
        else:
            rows.append([did, name, NOT_DECLARED, ""])
    prompts = str(declared.get("prompts", NOT_DECLARED))
    by = "the pipeline's [licenses]" if "prompts" in declared else ""
    rows.append(["prompts", "", prompts, by])
    note = (
        "Licences are as declared; nothing was checked. A model's licence decides whether its"
        " output may be used to train another model."
    )
    return Table("Licences", ["", "name", "licence", "declared in"], rows, left=4, note=note)


def license_of(model: Path) -> str | None:
    """Return the `license` (or `license_name`) in the front matter of a model folder's README.md;
    None if there is none."""
    readme = model / "README.md"
    if not readme.is_file():
        return None
    front = _FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
    license_ = _LICENSE.search(front[1]) if front else None
    return license_[1].strip("\"'") if license_ else None


def _models(metadata: dict[int, dict[str, Any]]) -> Table:
    rows = []
    for number, shard in metadata.items():
        for part, did in _PARTS.items():
            model = shard[part]
            rows.append([f"round {number}", did, str(model["name"]), str(model["version"])])
    note = "A version is the hub's commit, or a hash of config and weights."
    return Table("Models", ["", "part", "name", "version"], rows, left=4, note=note)


def _templates(metadata: dict[int, dict[str, Any]]) -> Table:
    def line(name: str, shard: dict[str, Any]) -> str:
        value = shard.get(name)
        if name == "template" and isinstance(value, dict):
            return f"{value.get('name')}, version {value.get('version')}, {value.get('hash')}"
        return _shown(value)

    names = {
        "template": "rewrite template",
        "chat_template": "teacher's chat template",
        "tokenizer": "tokenizer",
        "vocab_size": "vocabulary",
        "num_logprobs": "log-probabilities per token (K)",
        "score_context": "score context",
        "score_temperature": "score temperature",
    }
    return _by_round("Templates and scoring", names, metadata, line)


def _filters(metadata: dict[int, dict[str, Any]]) -> Table:
    """Return a table of the settings that decide which rewrites are kept."""

    def line(name: str, shard: dict[str, Any]) -> str:
        return _shown(shard.get("filters", {}).get(name, shard.get(name)))

    names = sorted({name for shard in metadata.values() for name in shard.get("filters", {})})
    labels = {name: name for name in (*names, "num_candidates", "choose")}
    return _by_round("Filters", labels, metadata, line)


def _by_round(
    caption: str, names: dict[str, str], metadata: dict[int, dict[str, Any]], line: Any
) -> Table:
    """Return a row for each name; one column if all rounds agree, else one for each round."""
    values = {n: [line(name, shard) for name in names] for n, shard in metadata.items()}
    columns = list(values.values())
    same = all(column == columns[0] for column in columns)
    head = ["", "value"] if same else ["", *(f"round {n}" for n in values)]
    rows = [[label, *cells] for label, *cells in zip(
        names.values(), *(columns[:1] if same else columns), strict=True)]  # fmt: skip
    return Table(caption, head, rows, left=len(head))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _content(distilled: dict[int, Path]) -> Iterator[Block]:
    carried: set[str] = set()
    for folder in distilled.values():
        config = stage_info(folder, "rollouts").get("details", {}).get("config", {})
        carried |= set(map(str, config.get("metadata_columns", [])))
    named = f" ({', '.join(sorted(carried))})" if carried else ""
    yield Paragraph(
        "Personal and unknown content. Nothing was searched for or removed. The rollouts hold the"
        " prompts unchanged (columns problem and prompt), and the columns that were carried"
        f" through{named} in metadata. Whether they contain personal data, and what their authors"
        " agreed to, is not known here. Models wrote the rest. A kept rewrite has passed the"
        " filters above, which compare answers and not the steps that lead to them."
    )
    frames = [frame for f in distilled.values() if (frame := scan([f], "distill")) is not None]
    kept = pl.concat(frames).filter(pl.col("status") == "ok")
    graded, right, total = collect(
        kept.select(
            pl.col("is_correct").is_not_null().sum().alias("graded"),
            pl.col("is_correct").sum().alias("right"),
            pl.len().alias("total"),
        )
    ).row(0)
    yield Paragraph(
        f"{graded:,} of the {total:,} kept rewrites have a gold answer to be compared with;"
        f" {right:,} of them end in it."
    )


def contamination(run: Run) -> Iterator[Block]:
    """Yield a comparison of the training prompts with those of each evaluation set."""
    if not run.evaluations:
        yield Paragraph("There is no evaluation to compare the training prompts with.")
        return
    # Sets that sample the same prompts in different ways are compared once.
    sets: dict[str, list[str]] = {}
    for name, folders in run.evaluations.items():
        identity = stage_info(folders[min(folders)], "rollouts").get("identity", {})
        sets.setdefault(str(identity.get("prompts", name)), []).append(name)
    rows, worst = [], []
    n = 0
    for names in sets.values():
        name, folders = ", ".join(names), run.evaluations[names[0]]
        evaluation = _prompts([folders[min(folders)]])
        result = check_contamination(_prompts(list(run.rounds.values())), evaluation)
        n = result.n
        cells = (result.num_train, result.num_evaluation, result.exact, result.overlapping)
        rows.append([name, *(f"{count:,}" for count in cells), f"{100 * result.share:.1f}%"])
        worst += [
            [name, match.evaluation_id, match.train_id, match.ngram, f"{100 * match.share:.0f}%"]
            for match in result.matches[:_MATCHES]
        ]
    head = ["set", "training prompts", "evaluation prompts", "the same", f"share a {n}-gram"]
    head.append("of all")
    note = (
        f"The same: equal except for spacing and case. A {n}-gram: {n} words in a row, without"
        " punctuation and case. Prompts made from one pattern share some and are not copies."
    )
    yield Table("Evaluation prompts among the training prompts", head, rows, note=note)
    if worst:
        head = ["set", "evaluation prompt", "training prompt", "as in", f"shared {n}-grams"]
        yield Table("The closest pairs", head, worst, left=4)


def _prompts(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of each prompt of these rounds once, in the order of the shards."""
    seen: set[str] = set()
    for folder in folders:
        for row in RoundDir(folder).rows("rollouts", ["prompt_id", "problem"]):
            if row["prompt_id"] not in seen:
                seen.add(row["prompt_id"])
                yield row["prompt_id"], row["problem"]
