"""Everything that a serving process needs.  Nothing here imports torch, diffusers or transformers."""
