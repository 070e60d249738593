"""The command line: no logic, one table of errors."""

from .app import main

__all__ = ["main"]
