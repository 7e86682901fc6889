"""``python -m dirtylog``: the command line without its script."""

from __future__ import annotations

import sys

from dirtylog.cli import main

sys.exit(main())
