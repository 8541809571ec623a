"""Measure how well the pocket models solve each family and how the teacher rewrites real drafts.

    python -m pipelines.pocket.evaluate_models --models pipelines/pocket/models

Problems come from the "validation" split, which neither training nor the test figures use. Every
row of the tables states its number of samples. Accuracies are fractions, lengths are tokens with
the end token, and a completion without an end token counts as wrong.
"""

import random
from itertools import islice
from pathlib import Path

import click
import torch

from pipelines.pocket.generation import Sample, load, rewrite_prompt, sample
from pipelines.pocket.world import FAMILIES, ideal_rewrite, problems, route_of


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def mean_tokens(samples: list[Sample]) -> float:
    return sum(one.num_tokens for one in samples) / len(samples)


def solving_rows(role: str, temperature: float, samples: list[Sample]) -> list[str]:
    rows = []
    for family in FAMILIES:
        own = [one for one in samples if one.problem.family == family]
        accuracy = share([one.right for one in own])
        ended = share([one.ended for one in own])
        rows.append(
            f"| {role} | {family} | {temperature:g} | {len(own)} | {accuracy:.3f} "
            f"| {mean_tokens(own):.1f} | {ended:.3f} |"
        )
    return rows


def rewriting_row(family: str, drafts: list[Sample], rewrites: list[Sample]) -> str:
    pairs = list(zip(drafts, rewrites, strict=True))
    from_right = [rewrite.right for draft, rewrite in pairs if draft.right]
    from_wrong = [rewrite.right for draft, rewrite in pairs if not draft.right]
    formed = share([one.well_formed for one in rewrites])
    not_longer = share([rewrite.num_tokens <= draft.num_tokens for draft, rewrite in pairs])
    same_route = share(
        [route_of(d.problem, d.text) == route_of(d.problem, r.text) for d, r in pairs]
    )
    ideal = share([r.text == ideal_rewrite(d.problem, d.text) for d, r in pairs])
    return (
        f"| {family} | {len(pairs)} | {mean_tokens(drafts):.1f} | {mean_tokens(rewrites):.1f} "
        f"| {formed:.3f} | {not_longer:.3f} | {same_route:.3f} | {ideal:.3f} "
        f"| {share(from_right):.3f} of {len(from_right)} "
        f"| {share(from_wrong):.3f} of {len(from_wrong)} |"
    )


@click.command(help="Measure the pocket student and teacher.")
@click.option("--models", type=click.Path(path_type=Path), default=Path("pipelines/pocket/models"))
@click.option("--per-family", default=200, show_default=True, type=click.IntRange(min=1))
def main(models: Path, per_family: int) -> None:
    torch.set_num_threads(1)
    tasks = [
        (problem, problem.text)
        for family in FAMILIES
        for problem in islice(
            problems(random.Random(f"evaluate {family}"), (family,), "validation"), per_family
        )
    ]
    student, tokenizer = load(models / "student")
    teacher, _ = load(models / "teacher")
    click.echo("| model | family | temperature | problems | accuracy | tokens | ended |")
    click.echo("|---|---|---|---|---|---|---|")
    drafts = sample(student, tokenizer, tasks, temperature=1.0)
    click.echo("\n".join(solving_rows("student", 1.0, drafts)))
    for role, model, temperature in (
        ("student", student, 0.0),
        ("teacher", teacher, 1.0),
        ("teacher", teacher, 0.0),
    ):
        samples = sample(model, tokenizer, tasks, temperature)
        click.echo("\n".join(solving_rows(role, temperature, samples)))

    # Only a finished rollout can be a draft.
    drafts = [draft for draft in drafts if draft.ended]
    rewrites = sample(
        teacher,
        tokenizer,
        [(draft.problem, rewrite_prompt(draft.problem.text, draft.text)) for draft in drafts],
        temperature=0.0,
    )
    click.echo(
        "\n| family | drafts | draft tokens | rewrite tokens | well-formed | not longer "
        "| same route | ideal | right from right | right from wrong |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for family in FAMILIES:
        own = [index for index, one in enumerate(drafts) if one.problem.family == family]
        click.echo(rewriting_row(family, [drafts[i] for i in own], [rewrites[i] for i in own]))


if __name__ == "__main__":
    main()
