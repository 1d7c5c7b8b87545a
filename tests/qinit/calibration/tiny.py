"""A tokenizer whose token ids can be read off the text: word `w17` has id 17."""

from pathlib import Path
from typing import Any

from tests.conftest import make_checkpoint

UNKNOWN = 3


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def add_tokenizer(
    directory: Path, *, bos: bool = False, encoder: bool = False, size: int = 256, **options: Any
) -> Path:
    """Save a word tokenizer into `directory`: pad 0, bos 1, eos 2; `bos` puts bos in front of every text,
    `encoder` puts bos in front and eos behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": UNKNOWN}
    vocabulary = {**special, **{f"w{i}": i for i in range(4, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if encoder else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **{"model_max_length": 10**9, **options},
    ).save_pretrained(directory)
    return directory


def make_bert(directory: Path, **overrides: Any) -> Path:
    """Save a tiny encoder that takes up to 32 tokens, with its tokenizer."""
    import transformers

    config = transformers.BertConfig(
        **{
            **{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0},
            **overrides,
        }
    )
    transformers.BertForMaskedLM(config).save_pretrained(directory)
    return add_tokenizer(directory, encoder=True)


def make_reader(directory: Path, *, bos: bool = False, **overrides: Any) -> Path:
    """Save a tiny Llama (256 ids, 128 positions) with the word tokenizer."""
    return add_tokenizer(make_checkpoint(directory, **overrides), bos=bos)
