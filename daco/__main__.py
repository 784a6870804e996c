"""`python -m daco`: the command line `daco`."""

import sys

from daco.cli import main

sys.exit(main())
