"""The data card: describes the distillation shards of a run to people who get them without it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from mpd_data.inspect.contamination import check_contamination
from mpd_data.inspect.stats import collect, scan_round
from mpd_data.store.round import RoundDir
from mpd_rounds.report.document import Block, Code, Paragraph, Table
from mpd_rounds.report.queries import Funnel
from mpd_rounds.report.run import Run, rollouts_info, round_name, shard_metadata

NOT_DECLARED = "not declared"
_MATCHES = 10  # pairs of similar prompts listed per evaluation set
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_LICENSE = re.compile(r"^license(?:_name)?:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def data_card(run: Run, funnels: dict[int, Funnel]) -> Iterator[Block]:
    """Yield the data card of a run of mpd-rounds."""
    distilled = {n: folder for n, folder in run.rounds.items() if funnels[n].rewrites}
    if not distilled:
        yield Paragraph("There are no rewrites yet, so there is no data to describe.")
        return
    metadata = {n: shard_metadata(folder, "distill") for n, folder in distilled.items()}
    kept = sum(funnels[n].kept for n in distilled)
    rows = sum(funnels[n].rewrites for n in distilled)
    made = "a model's solution, rewritten more concisely"
    if all(shard["template"]["name"] == "draft" for shard in metadata.values()):
        made = "a model's solution as it was sampled, scored by a teacher"
    yield Paragraph(
        f"{rows:,} rewrites from {len(distilled)} round{'s' * (len(distilled) > 1)}, {kept:,} of"
        f" them kept. A row is {made}. A kept row has the"
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
    pattern = str(run.path / "data" / "round*" / "distill" / "*.parquet")
    scanned = f"import polars as pl\nkept = pl.scan_parquet({pattern!r})"
    yield Code(f'{scanned}.filter(pl.col("status") == "ok").collect()', "python")


# Names of the models in a shard's metadata -> what they did.
_PARTS = {"student": "sampled by", "teacher": "rewritten and scored by"}


def _kept(folder: Path) -> pl.LazyFrame:
    return scan_round(folder, "distill").filter(pl.col("status") == "ok")


def _counts(distilled: dict[int, Path], funnels: dict[int, Funnel]) -> Table:
    rows = []
    for number, folder in distilled.items():
        tokens = collect(
            _kept(folder).select(pl.col("num_rewritten_tokens").cast(pl.Int64).sum())
        ).item()
        size = sum(f.stat().st_size for f in RoundDir(folder).shard_paths("distill"))
        funnel = funnels[number]
        cells = (funnel.prompts, funnel.rollouts, funnel.rewrites, funnel.kept, tokens)
        rows.append([round_name(number), *(f"{n:,}" for n in cells), f"{size / 1e6:,.1f}"])
    head = ["", "prompts", "rollouts", "rewrites", "kept", "kept tokens", "MB"]
    return Table("Counts", head, rows)


def _sources(run: Run, distilled: dict[int, Path]) -> Table:
    rows = [[round_name(n), *_source(folder)] for n, folder in distilled.items()]
    for name, folders in run.evaluations.items():
        rows.append([f"evaluation {name}", *_source(folders[min(folders)])])
    head = ["used by", "files or data sets", "columns", "prompts' hash"]
    note = "The hash covers ids, texts and gold answers of the chosen prompts."
    return Table("Sources of the prompts", head, rows, left=4, note=note)


def _source(folder: Path) -> list[str]:
    info = rollouts_info(folder)
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
    by = "the pipeline's [licenses]" if "prompts" in declared else ""
    rows.append(["prompts", "", str(declared.get("prompts", NOT_DECLARED)), by])
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
    rows = [
        [round_name(n), did, str(shard[part]["name"]), str(shard[part]["version"])]
        for n, shard in metadata.items()
        for part, did in _PARTS.items()
    ]
    note = "A version is the hub's commit, or a hash of config and weights."
    return Table("Models", ["", "part", "name", "version"], rows, left=4, note=note)


def _templates(metadata: dict[int, dict[str, Any]]) -> Table:
    names = {
        "template": "rewrite template",
        "chat_template": "teacher's chat template",
        "tokenizer": "tokenizer",
        "vocab_size": "vocabulary",
        "num_logprobs": "log-probabilities per token (K)",
        "score_context": "score context",
        "score_temperature": "score temperature",
    }
    values = {
        n: {label: shard.get(name) for name, label in names.items()}
        for n, shard in metadata.items()
    }
    return _by_round("Templates and scoring", values)


def _filters(metadata: dict[int, dict[str, Any]]) -> Table:
    """Return a table of the settings that decide which rewrites are kept."""
    names = sorted({name for shard in metadata.values() for name in shard.get("filters", {})})
    names += ["num_candidates", "choose"]
    values = {
        n: {name: shard.get("filters", {}).get(name, shard.get(name)) for name in names}
        for n, shard in metadata.items()
    }
    return _by_round("Filters", values)


def _by_round(caption: str, values: dict[int, dict[str, Any]]) -> Table:
    """Return a row for each name; one column if all rounds agree, else one for each round."""
    columns, head = list(values.values()), ["", *map(round_name, values)]
    if all(column == columns[0] for column in columns):
        columns, head = columns[:1], ["", "value"]
    rows = [[name, *(_shown(column[name]) for column in columns)] for name in columns[0]]
    return Table(caption, head, rows, left=len(head))


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # a template
        return f"{value.get('name')}, version {value.get('version')}, {value.get('hash')}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _content(distilled: dict[int, Path]) -> Iterator[Block]:
    carried: set[str] = set()
    for folder in distilled.values():
        config = rollouts_info(folder).get("details", {}).get("config", {})
        carried |= set(map(str, config.get("metadata_columns", [])))
    named = f" ({', '.join(sorted(carried))})" if carried else ""
    yield Paragraph(
        "Personal and unknown content. Nothing was searched for or removed. The rollouts hold the"
        " prompts unchanged (columns problem and prompt), and the columns that were carried"
        f" through{named} in metadata. Whether they contain personal data, and what their authors"
        " agreed to, is not known here. Models wrote the rest. A kept rewrite has passed the"
        " filters above, which compare answers and not the steps that lead to them."
    )
    graded, right, total = collect(
        pl.concat(map(_kept, distilled.values())).select(
            graded=pl.col("is_correct").count(), right=pl.col("is_correct").sum(), total=pl.len()
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
        identity = rollouts_info(folders[min(folders)]).get("identity", {})
        sets.setdefault(str(identity.get("prompts", name)), []).append(name)
    rows, worst = [], []
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
    head = ["set", "training prompts", "evaluation prompts", "the same", f"share a {n}-gram",
            "of all"]  # fmt: skip
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
