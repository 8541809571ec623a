"""`mpd-gen`: sample rollouts, rewrite them, and inspect the shards.

Exit codes: 0 done, 1 fatal, 2 usage, 3 done with failed rows (in errors/), 130 interrupted
(run the same command again to resume). Results go to stdout, progress and messages to stderr.
"""

import click

from mpd_data.commands.check import contamination, env, push, validate
from mpd_data.commands.generate import init, rewrite, rollouts
from mpd_data.commands.look import compare, stats, status, view
from mpd_data.common.command import CONTEXT, VERSION, Group, run_command
from mpd_data.parts.serve import serve
from mpd_data.parts.session import is_session


@click.group(
    cls=Group,
    context_settings=CONTEXT,
    replaced={
        "plan": "mpd-rounds PIPELINE --dry-run",
        "completion": "_MPD_GEN_COMPLETE=bash_source mpd-gen (or zsh_source, fish_source)",
    },
)
@VERSION
def cli() -> None:
    """Sample rollouts with a student, rewrite them with a teacher, and inspect the result."""


# Help lists them in this order.
for command in (
    init, rollouts, rewrite, status, stats, compare, view, validate, contamination, push, env,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    if is_session():
        serve(cli)
    run_command(cli)


if __name__ == "__main__":
    main()
