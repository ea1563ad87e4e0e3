"""The `bwlens` command: `bwlens demo`, `lens`, `check`, `sweep`, `edit` and `evaluate`.

Errors that a user can mend are one readable line and exit code 1; `--debug` shows the traceback.
Wrong usage exits with 2, as every command does.
"""

import typer

from bwlens.cli.checking import check
from bwlens.cli.editing import edit, evaluate
from bwlens.cli.reading import demo, lens
from bwlens.cli.sweeping import sweep

app = typer.Typer(
    help="Read what a language model learns: the Backward Lens for TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for _command in (demo, lens, check, sweep, edit, evaluate):
    app.command()(_command)


def main() -> None:
    """Run the command line."""
    app()
