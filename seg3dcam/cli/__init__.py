"""The command line: the only room that prints."""

from seg3dcam.cli.commands import main

__all__ = ["main"]
