"""`python -m hvpfast` is the `hvpfast` command."""

import sys

from hvpfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
