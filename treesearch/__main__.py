"""python -m treesearch."""

import sys

from treesearch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
