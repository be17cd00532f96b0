"""Run ``pnp-trt`` as ``python -m pnp_trt``."""

from .cli.app import main

if __name__ == "__main__":
    main()
