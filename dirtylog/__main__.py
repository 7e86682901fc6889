"""``python -m dirtylog``: the command line without its script."""

import sys

from dirtylog.cli import main

sys.exit(main())
