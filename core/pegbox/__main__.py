"""`python -m pegbox`: the command line, as launchers start it."""

from pegbox.cli import main

if __name__ == "__main__":
    main()
