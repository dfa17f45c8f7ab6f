"""The engine process: `python -m workers.engine --socket PATH --spec JSON`; `models.server`, with our log."""

import logging
import sys

from jobs.logs import set_up_logging
from models.server import main

if __name__ == "__main__":
    set_up_logging("engine", logging.WARNING)
    logging.getLogger("models").setLevel(logging.INFO)
    sys.exit(main())
