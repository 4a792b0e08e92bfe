"""A folder for PYTHONPATH; it must hold no module with a package's name."""
