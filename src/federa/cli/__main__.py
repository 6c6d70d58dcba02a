"""`python -m federa.cli`."""

from federa.cli import main

main()
