"""``python -m pcenet`` is ``pcenet``."""

import sys

from pcenet.cli import main

if __name__ == "__main__":
    sys.exit(main())
