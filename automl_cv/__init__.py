__version__ = "0.1.0"

import os

# Read when torch loads its OpenMP library, hence here. Threads that spin for long while they wait for a core that
# another process uses stall each other; 01aa_machine tells what it costs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # of GNU's library, which would not spin at all
