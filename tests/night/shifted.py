"""Run `rtunnel` by a clock that is off: `python -m night.shifted SECONDS WORDS...`."""

from __future__ import annotations

import sys
import time

if __name__ == "__main__":
    right, off = time.time, float(sys.argv.pop(1))
    time.time = lambda: right() + off
    from rtunnel.cli import main

    main()
