"""`python -m fastbert` is `fastbert`."""

import sys

from fastbert.cli import main

sys.exit(main())
