"""A folder that ms-swift adds to ``sys.path``; it must hold no module with a package's name."""
