"""What trains and measures many models: sweeps, the benchmark, the quickstart, and the studies of the paper."""

import chiaroscuro.lab  # noqa: F401
