"""The gateway as a process: `python -m producer.gateway PORT [ADDRESS]`, with settings from the environment."""

from __future__ import annotations

import sys

from jobs.home import connected_settings
from jobs.logs import set_up_logging
from producer.gateway.serving import LOOPBACK, serve

if __name__ == "__main__":
    set_up_logging("gateway")
    serve(connected_settings().for_gateway(), int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else LOOPBACK)  # noqa: PLR2004
