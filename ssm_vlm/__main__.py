"""`python -m ssm_vlm` is the `ssm-vlm` command."""

import sys

from .cli import main

sys.exit(main())
