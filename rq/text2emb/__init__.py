"""Item texts into embeddings."""
