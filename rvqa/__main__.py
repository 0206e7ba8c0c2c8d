"""`python -m rvqa` is `rvqa`."""

from rvqa.cli import main

main()
