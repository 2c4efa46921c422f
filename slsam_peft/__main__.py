"""`python -m slsam_peft` runs the `slsam-peft` command."""

import sys

from slsam_peft.cli.main import main

sys.exit(main())
