"""`python -m pipelines`, and what torchrun starts: the command line."""

from pipelines.cli import main

main()
