"""``python -m pcenet.ops``: compile the kernels into the cache now, whatever there is, and say where they lie."""

from __future__ import annotations

import logging
import sys

from pcenet.ops.build import BuildError, build, shown

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logging.info("%s", shown(build(again=True)))
    except BuildError as error:
        sys.exit(str(error))
