"""Long documents: chunks by the model's own tokenizer, and late chunking."""

from halimede.documents.chunking import Chunk, Chunker

__all__ = ["Chunk", "Chunker"]
