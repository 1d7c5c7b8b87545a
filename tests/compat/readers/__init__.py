"""What `qinit export` writes, loaded by the programs that it is for, each in an environment of its own:

    make test-compat READERS="llama.cpp mlx-lm"

Environments are kept in build/compat, as the trainers' are. No part of `make test`.
"""
