"""What the compiler makes of the kernels, for GPUs that nobody needs to have: see __main__.py."""
