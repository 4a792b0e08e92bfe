"""A report on the compiled code of the kernels, without a GPU: see __main__.py."""
