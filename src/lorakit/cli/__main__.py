"""Lets `python -m lorakit.cli` do what `lorakit` does."""

import sys

from lorakit.cli.main import main

sys.exit(main())
