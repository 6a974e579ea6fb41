#!/usr/bin/env python
"""Entry point of the BIDS App: the same program as the command ``tlseg``."""

import sys

from tlseg_bids.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
