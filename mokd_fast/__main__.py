"""python -m mokd_fast: the command line, as torchrun starts it."""

from .cli import main

main()
