"""Lets `python -m lorakit`, and so torchrun, do what the command `lorakit` does."""

import sys

from lorakit.cli.main import main

sys.exit(main())
