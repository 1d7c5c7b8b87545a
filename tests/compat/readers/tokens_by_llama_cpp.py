"""MODEL.gguf TEXTS.json OUT.json: saves llama.cpp's ids of each text, with the special tokens that the file says."""

import json
import sys
from pathlib import Path

from llama_cpp import Llama

file, texts, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
model = Llama(file, vocab_only=True, verbose=False)
ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
Path(out).write_text(json.dumps(ids))
