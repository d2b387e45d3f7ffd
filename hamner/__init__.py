"""What the stage scripts and the tools share."""

import os

# Linux gives out memory in pages of 4 KB. In pages of 2 MB, for which PyTorch asks where this is
# set before its first tensor, a CPU trains faster (docs/EXPERIMENTS.md). It matters nowhere else.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
