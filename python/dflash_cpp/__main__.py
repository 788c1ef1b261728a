"""python -m dflash_cpp"""

import sys

from .cli import main

sys.exit(main())
