"""Other packages' layers and models: the only places that import those packages."""
