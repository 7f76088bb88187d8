"""The server: gRPC in, gRPC out. It decodes, calls ``inflora_core`` and encodes; never torch.

Start reading at ``server.py``, which constructs everything there is.
"""
