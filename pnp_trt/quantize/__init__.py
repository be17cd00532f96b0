"""INT8: ranges recorded while the sampler runs, the sweep that decides which layers take it, and the record of both."""
