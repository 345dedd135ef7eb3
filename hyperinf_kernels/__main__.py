"""`python -m hyperinf_kernels` is the command `hyperinf`."""

from .cli import main

if __name__ == "__main__":
    main()
