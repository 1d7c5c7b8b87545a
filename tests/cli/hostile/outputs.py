"""Where the result goes."""

from __future__ import annotations

from tests.cli.hostile.world import add, at, fifo, loop, text

for name, out, damage, says in (
    ("in the source", "../model/out", lambda w: None, "is, holds or lies in the source"),
    ("the source", "../model", lambda w: None, "is, holds or lies in the source"),
    ("a link to the source", "link", at("link", lambda path, w: path.symlink_to("../model")), "is, holds or lies in"),
    ("somebody's files", "../outside", lambda w: None, "has no qinit.json, so qinit did not write it"),
    ("a file", "file", text("file", b""), "exists and is no directory"),
    ("a pipe", "pipe", at("pipe", fifo), "exists and is no directory"),
    ("below a file", "file/out", text("file", b""), "file/out: cannot be "),
    ("a link to itself", "loop", at("loop", loop), "loop: cannot be "),
):
    add(f"out: {name}", says, damage, ("eqft", "{model}", "--overwrite", "--out", out))
