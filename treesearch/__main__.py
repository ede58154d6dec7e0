"""python -m treesearch."""

import sys

from treesearch.cli import main

if __name__ == "__main__":
    sys.exit(main())
