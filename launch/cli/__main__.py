"""`python -m launch.cli` is `phi3v`."""

from launch.cli.main import main

main()
