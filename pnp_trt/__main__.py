"""``python -m pnp_trt`` is ``pnp-trt``."""

from .cli import main

if __name__ == "__main__":
    main()
