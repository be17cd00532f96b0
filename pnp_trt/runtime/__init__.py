"""The modules that a serving process needs.  None of them imports torch, diffusers or transformers."""
