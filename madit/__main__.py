"""`python -m madit`: the `madit` command."""

from madit.cli import main

if __name__ == "__main__":
    main()
