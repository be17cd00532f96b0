"""Several GPUs with Ray: a server replica per GPU, and tables of prompts over several workers."""
