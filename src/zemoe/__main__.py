"""`python -m zemoe`: the `zemoe` command."""

import sys

from .cli import main

sys.exit(main())
