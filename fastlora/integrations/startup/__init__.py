"""A folder for PYTHONPATH, so no file here may have the name of an installed package."""
