"""The integer grid, and its kernels: the search for scales, and rounding under a Hessian."""
