"""``python -m pnp_trt`` is ``pnp-trt``."""

from .cli.app import main

if __name__ == "__main__":
    main()
