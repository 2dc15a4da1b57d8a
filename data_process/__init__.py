"""Raw interaction logs into items and next-item samples."""
