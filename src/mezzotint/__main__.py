"""`python -m mezzotint` is the command `mezzotint`."""

from mezzotint.cli import main

if __name__ == "__main__":
    main()
