"""``python -m fxopt``."""

from fxopt.cli import main

main()
