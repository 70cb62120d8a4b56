"""``python -m ddinfer``."""

import sys

from ddinfer.main import main

if __name__ == "__main__":
    sys.exit(main())
