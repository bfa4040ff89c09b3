"""`python -m bitstrata`: the `bitstrata` command, for launchers that take a module."""

import sys

from bitstrata.cli import main

sys.exit(main())
