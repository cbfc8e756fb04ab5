"""`python -m vtoken`: the command `vtoken`, for launchers that start modules, such as `accelerate`."""

from .cli.main import main

main()
