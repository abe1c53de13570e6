"""`python -m chiaroscuro` is the command line."""

from chiaroscuro.cli import main

main()
