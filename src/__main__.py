"""``python -m src COMMAND``."""

import sys

from src.cli import main

if __name__ == "__main__":
    sys.exit(main())
