"""`python -m twa`, as the command `twa`."""

import sys

from twa.command.main import main

sys.exit(main())
