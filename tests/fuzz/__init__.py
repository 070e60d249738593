"""Input that nobody wrote: whatever the bytes, a reader gives a result or a `FireError`, soon and in little memory.

`targets` is the table of what is fed: each target takes bytes as others hand them to us, has seeds made from valid
examples, and a strategy that bends valid examples. `test_fuzz` runs a small sample of it; `python -m tests.fuzz all
--inputs 20000` is the campaign, guided by coverage where atheris is installed (`pip install 'fire-opd[fuzz]'`).
"""
