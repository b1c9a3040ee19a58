"""``python -m kvmerge`` is the ``kvmerge`` command."""

import sys

from .cli import main

sys.exit(main())
