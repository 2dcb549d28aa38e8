"""`python -m zemoe`: the `zemoe` command, but for a Ctrl-C while the package itself is imported."""

import sys

from zemoe_main import main

sys.exit(main())
