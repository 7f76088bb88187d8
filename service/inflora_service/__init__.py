"""The server: gRPC in, gRPC out. It decodes, calls ``inflora_core`` and encodes; never torch.

Start reading at ``server.py``, which constructs everything there is.
"""

import os

# What forks here is uvloop, to start another program at once. gRPC would get ready for children
# that go on with its channels, and complain of each that it cannot.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
