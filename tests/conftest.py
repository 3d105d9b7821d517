"""What every test shares: one thread, a fixed search of hypothesis, small real objects."""

from __future__ import annotations

import os

import hypothesis
import torch

# The same examples on every run, and no deadline: a shared machine has slow minutes.
# HYPOTHESIS_PROFILE=explore searches on, with new examples each time.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Workers of pytest-xdist run side by side; one thread each is faster than many that share the cores.
torch.set_num_threads(1)
