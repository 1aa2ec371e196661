"""``python -m retrain`` is the command line."""

import sys

from retrain.cli.main import main

sys.exit(main())
