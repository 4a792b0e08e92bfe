"""The ops: registered with ``torch.library``, differentiable, and the functional API on top."""
