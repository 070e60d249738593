"""Hostile acts on run directories, for tests and for the campaign (`python -m tests.campaign`)."""
