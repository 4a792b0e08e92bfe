"""What all other folders use: values, text, blocks of rows, files, clocks, and other packages."""
