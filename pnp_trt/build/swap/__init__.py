"""Replacing the weights of a built bundle (``pnp-trt plug``)."""
