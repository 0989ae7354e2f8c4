"""`python -m dynaslim` runs the `dynaslim` command."""

from dynaslim.cli import main

main()
