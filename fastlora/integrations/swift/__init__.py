"""ms-swift adds this folder to ``sys.path``, so no file may have the name of a package."""
