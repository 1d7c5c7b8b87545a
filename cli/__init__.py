"""The command line of qinit: parse, call the library, draw."""
