"""The server's parts: the protocol, its tensors, batching, reload and metrics."""
