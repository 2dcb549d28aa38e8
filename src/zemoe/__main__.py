"""`python -m zemoe`: the `zemoe` command."""

from .cli import main

main()
