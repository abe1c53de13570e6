"""Experiments on the library itself, which take the whole of a machine for minutes or hours."""

import os

# Before PyTorch is loaded: trials are forks, which threads would not survive.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
