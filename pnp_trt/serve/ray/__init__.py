"""Many GPUs by Ray: a replica per GPU around the same engines, and tables of prompts over several workers."""
