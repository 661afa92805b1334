"""``python -m pcenet.ops``: compile the kernels into the cache now, whatever there is, and say where they lie.

Those that came with the package are used before them.
"""

from __future__ import annotations

import logging
import sys

from pcenet.ops.build import IN_PACKAGE, BuildError, build, shown

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logging.info("%s", shown(build(again=True)))
        if IN_PACKAGE.is_file():
            logging.info("%s is used before it", shown(IN_PACKAGE))
    except BuildError as error:
        sys.exit(str(error))
