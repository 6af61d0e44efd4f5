"""The command line: every file parses, calls one function and prints."""

from topiarist.cli.app import app, main

__all__ = ["app", "main"]
