"""What all tests share: one thread, as the stored notebooks have (sums in another order round otherwise), and no fixed global state."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
