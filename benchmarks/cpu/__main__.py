"""The native CPU kernels beside what else runs the delta rule on a CPU: `python benchmarks/cpu`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where what all benchmarks share is

from sections import main

if __name__ == "__main__":
    main()
