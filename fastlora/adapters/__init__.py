"""Operations on saved adapters: resize, combine, export to llama.cpp's format."""
