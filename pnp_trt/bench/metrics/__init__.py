"""Image metrics: KID, FID, CLIP score and retrieval."""
