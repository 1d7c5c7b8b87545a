"""config.json and what lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.cli.hostile.world import (
    EQFT,
    OUT_OF,
    World,
    add,
    beside,
    device,
    edit_config,
    fifo,
    folder,
    instead,
    link_out,
    loop,
    sparse,
)


def write_config(content: bytes) -> Callable[[World], object]:
    return beside("config.json", content)


def many_files(world: World) -> None:
    (world.model / "many").mkdir()
    for number in range(10_001):
        (world.model / "many" / str(number)).touch()


BILLION = 10**9


OTHER_MODEL = "config and weights belong to different models"


MOE = {
    **{"model_type": "switch_transformers", "architectures": ["SwitchTransformersEncoderModel"], "d_model": 64},
    **{"d_ff": 8, "num_layers": 2, "num_sparse_encoder_layers": 2, "num_heads": 2, "d_kv": 8, "num_experts": BILLION},
}


MANY_MODULES = ("a thousand layers", "a billion experts")  # ten thousand are made before it is known: seconds


for name, damage, says in (
    ("a billion layers", edit_config(num_hidden_layers=BILLION), "num_hidden_layers is 1000000000, but the checkpoint"),
    ("a billion layers, as 1e9", edit_config(num_hidden_layers=1e9), "num_hidden_layers is 1000000000.0, but"),
    ("layers without end", edit_config(num_hidden_layers=float("inf")), "num_hidden_layers is inf, but the checkpoint"),
    ("a billion layers, further down", edit_config(text_config={"n_layer": BILLION}), "n_layer is 1000000000, but"),
    ("a billion layers, in a list", edit_config(vision=[{"depths": [2, BILLION]}]), "depths is 1000000000, but"),
    ("a thousand layers", edit_config(num_hidden_layers=1000), "describes more than 10000 modules, but the checkpoint"),
    ("three layers", edit_config(num_hidden_layers=3), "no weight for module 'model.layers.2.self_attn.q_proj'"),
    ("layers as text", edit_config(num_hidden_layers="two"), "num_hidden_layers"),
    ("layers as a list", edit_config(num_hidden_layers=[2]), "num_hidden_layers"),
    ("minus one layers", edit_config(num_hidden_layers=-1), "no linear module is left to quantize"),
    ("a billion labels", edit_config(num_labels=BILLION), "num_labels is 1000000000, but no tensor of the checkpoint"),
    ("a billion positions", edit_config(max_position_embeddings=BILLION), "at most 16777216 are read"),
    (
        *("a billion experts", write_config(json.dumps(MOE).encode())),
        "describes more than 10000 modules",
    ),
    ("width of 10^12", edit_config(hidden_size=10**12), "config.json"),
    ("width of 10^30", edit_config(hidden_size=10**30), "config.json"),
    ("width of 1.5", edit_config(hidden_size=1.5), "hidden_size"),
    ("width of -64", edit_config(hidden_size=-64), "config.json"),
    ("vocabulary of 10^15", edit_config(vocab_size=10**15), OTHER_MODEL),
    ("vocabulary of 10", edit_config(vocab_size=10), "tensor 'model.embed_tokens.weight' has shape [256, 64]"),
    ("no heads", edit_config(num_attention_heads=0), "config.json"),
    ("heads of 10^12", edit_config(head_dim=10**12), "describes buffers of more than 1.1 GB ('inv_freq' and others)"),
    ("middle of 10^30", edit_config(intermediate_size=10**30), "config.json"),
    ("unknown type", edit_config(model_type="nosuch"), "does not know this model (model_type 'nosuch')"),
    ("type is a list", edit_config(model_type=["llama"]), "does not know this model"),
    ("neither type nor class", write_config(b"{}"), "does not know this model (model_type None)"),
    ("architectures is a number", edit_config(architectures=5), "no model can be built from it"),
    ("another model's type", edit_config(model_type="gpt2", architectures=None), "no weight for module 'transf"),
    (
        *("code of its own", edit_config(model_type="own", auto_map={"AutoConfig": "own.C"})),
        "needs code that the checkpoint brings (auto_map), and that code can do anything",
    ),
    (
        *("code of another repository", edit_config(model_type="own", auto_map={"AutoConfig": "a/b--own.C"})),
        "pass --trust-remote-code to run it",
    ),
    ("compiled code", edit_config(_attn_implementation="a/b"), "_attn_implementation names compiled code to download"),
    ("compiled code for a part", edit_config(attn_implementation={"x": "a/b"}), "attn_implementation.x names compiled"),
    ("unknown activation", edit_config(hidden_act="__import__('os')"), "config.json: "),
    ("already quantized", edit_config(quantization_config={"quant_method": ["x"]}), "already quantized"),
    ("deep nesting", write_config(b'{"a":' * 100_000), "nested too deeply"),
    ("nesting of 900", write_config(b'{"a":' * 900 + b"1" + b"}" * 900), "nested more than 64 deep"),
    ("a name twice", write_config(b'{"hidden_size":64,"hidden_size":65}'), "'hidden_size' stands there twice"),
    ("5 million lists", write_config(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"), "more than 4000000 values"),
    ("number of 5000 digits", write_config(b'{"a":' + b"9" * 5000 + b"}"), "4300 digits"),
    ("not UTF-8", write_config(b'{"a":"\xff"}'), "not valid JSON ('utf-8' codec can't decode byte 0xff"),
    ("half a surrogate", write_config(b'{"model_type":"\\udfff"}'), "half of a surrogate pair"),
    ("a list", write_config(b"[]"), "expected a JSON object, found list"),
    ("text", write_config(b'"llama"'), "expected a JSON object, found str"),
    ("empty", write_config(b""), "config.json: not valid JSON"),
    ("1 GB", sparse("model/config.json", 10**9), "has 1000.0 MB, at most 67.1 MB are read"),
    ("link that leaves", instead("config.json", link_out), OUT_OF),
    ("link to itself", instead("config.json", loop), "config.json: Too many levels of symbolic links"),
    ("pipe", instead("config.json", fifo), "config.json: cannot be read (not a regular file)"),
    ("folder", instead("config.json", folder), "config.json: cannot be read (Is a directory)"),
    ("endless device", instead("config.json", device), OUT_OF),
):
    add(f"config: {name}", says, damage, *((EQFT,) if name in MANY_MODULES else ()))


for name, damage, says in (
    ("an adapter", beside("adapter_config.json", b"{}"), "lies beside the model, so that transformers would load"),
    ("a link to a secret", lambda w: (w.model / "notes.txt").symlink_to(w.outside / "secret"), f"notes.txt: {OUT_OF}"),
    ("a link to a secret in a folder",
     lambda w: ((w.model / "a").mkdir(), (w.model / "a/b.txt").symlink_to("../../outside/secret")), OUT_OF),
    ("a tokenizer that leads out", instead("tokenizer.json", link_out), OUT_OF),
    ("a line end in a name", beside("a\nb.txt", b""), "its name holds characters that cannot be printed"),
    (
        *("a line end in a folder's name", lambda w: ((w.model / "a\nb").mkdir(), (w.model / "a\nb/c").touch())),
        "a b/c: its name holds characters",
    ),
    ("a clear screen in a name", beside("a\x1b[2Jb.txt", b""), "a\\x1b[2Jb.txt: its name holds characters"),
    ("a name that is no UTF-8", lambda w: Path(os.fsdecode(os.fsencode(w.model) + b"/\xff")).touch(), "its name holds"),
    ("10001 files", many_files, "holds more than 10000 files beside its weights"),
):  # fmt: skip
    add(f"beside: {name}", says, damage)


add("beside: a file of 8 TB", "GB are free there", sparse("model/big.txt", 8 << 40), EQFT)
