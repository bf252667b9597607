"""python -m pasa_jax.cli"""

import sys

from pasa_jax.cli import main

sys.exit(main())
