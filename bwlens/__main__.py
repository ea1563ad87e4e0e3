"""`python -m bwlens` is the `bwlens` command."""

from bwlens.cli import main

main()
