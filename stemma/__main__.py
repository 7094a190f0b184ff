"""`python -m stemma` is the `stemma` command."""

from stemma.cli import main

main()
