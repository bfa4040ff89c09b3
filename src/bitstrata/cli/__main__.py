"""`python -m bitstrata.cli`: the same as the `bitstrata` command."""

import sys

from bitstrata.cli import main

sys.exit(main())
