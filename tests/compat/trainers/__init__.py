"""What `qinit trainer-config` writes, run by the trainers themselves, each in an environment of its own:

    make test-compat [TRAINERS="trl axolotl"]

Environments are kept in build/compat and made anew when their commands change. No part of `make test`, but for
tests/compat/test_trl.py.
"""
