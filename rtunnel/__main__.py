"""`python -m rtunnel` is the command `rtunnel`."""

from rtunnel.cli import main

main()
