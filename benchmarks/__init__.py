"""How fast bwlens is beside the least work that could be done: `python -m benchmarks`."""

import os

# The models are random and built here; nothing is to ask a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The memory profiler's chatter.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
