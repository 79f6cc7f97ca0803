"""`python -m nemodiff` is the `nemodiff` command."""

from .cli import main

main()
