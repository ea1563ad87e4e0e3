"""The `bwlens` command: read, check, sweep, edit, evaluate, count, heads, changes and data sets.

Errors that a user can mend are one readable line and exit code 1; `--debug` shows the traceback.
Wrong usage exits with 2, as every command does.
"""

from typing import Annotated

import typer

from bwlens.cli.change import change, dataset
from bwlens.cli.checking import check
from bwlens.cli.counting import statistics
from bwlens.cli.editing import edit, evaluate
from bwlens.cli.heads import heads
from bwlens.cli.reading import demo, lens
from bwlens.cli.sweeping import sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        from bwlens import __version__

        typer.echo(f"bwlens {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Read what a language model learns: the Backward Lens for TransformerLens."""


for _command in (demo, lens, heads, check, sweep, edit, evaluate, statistics, change, dataset):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()
