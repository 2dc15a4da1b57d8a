"""Item texts into semantic IDs: embeddings, residual quantisation, indices."""
