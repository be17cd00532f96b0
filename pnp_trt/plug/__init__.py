"""``pnp-trt plug``: the weights of a fine-tune put into a built bundle, without exporting again."""
