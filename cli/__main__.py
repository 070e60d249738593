"""`python -m fire_data.cli`: the command line where the script `fire` is not at hand, as under torchrun."""

from .app import main

main()
