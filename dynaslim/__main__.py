"""`python -m dynaslim` is the `dynaslim` command."""

from dynaslim.cli import main

main()
