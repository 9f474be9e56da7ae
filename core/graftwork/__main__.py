"""`python -m graftwork`: the same as the command `graftwork`."""

from graftwork.cli import main

if __name__ == "__main__":
    main()
