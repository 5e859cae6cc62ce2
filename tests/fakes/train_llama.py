"""Trains a tiny real Llama that answers one question with one sentence: run by the ENGINE environment's python, which has torch.

`python train_llama.py --question Q --answer A --out DIR [--seed N]`; it fails unless greedy generation
gives the sentence exactly. Imports no project code.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch

# More threads spin against each other on a small busy machine: 172 s were seen where one thread takes 7.
torch.set_num_threads(1)

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, BOS, EOS = 0, 1, 7
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
POSITIONS = 512


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 512 entries, trained on the sentences."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prompts(tokenizer: PreTrainedTokenizerFast, question: str) -> list[list[int]]:
    """The three ways to ask: chat, chat with a system message, plain completion."""
    user = {"role": "user", "content": question}
    rows = [[user], [{"role": "system", "content": SYSTEM}, user]]
    texts = [tokenizer.apply_chat_template(row, add_generation_prompt=True, tokenize=False) for row in rows]
    texts.append(f"<s>{question} ")
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def make_model() -> LlamaForCausalLM:
    """An untrained Llama of 0.36 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def train(model: LlamaForCausalLM, rows: list[tuple[list[int], list[int]]]) -> float:
    """Full-batch AdamW until the loss is below 1e-3 or 400 steps passed; returns the last loss."""
    width = max(len(p) + len(a) for p, a in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (PAD, -100, 0))
    for i, (prompt, answer) in enumerate(rows):
        n = len(prompt) + len(answer)
        ids[i, :n] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : n] = torch.tensor(answer)
        mask[i, :n] = 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    loss = float("inf")
    for _ in range(400):
        optimiser.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        optimiser.step()
        loss = float(out.loss)
        if loss < 1e-3:
            break
    return loss


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, answer: str) -> None:
    """Ends the program unless greedy generation gives the sentence for each way to ask."""
    model.eval()
    for prompt in prompts(tokenizer, question):
        given = torch.tensor([prompt])
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=300, pad_token_id=PAD, eos_token_id=EOS)
        text = tokenizer.decode(out[0][len(prompt) :], skip_special_tokens=True)
        if text != answer:
            sys.exit(f"train_llama: generation gave {text!r}, expected {answer!r}")


def main() -> None:
    """Trains, checks in the stored precision, saves, prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer([args.question, args.answer, SYSTEM])
    target = [*tokenizer.encode(args.answer, add_special_tokens=False), EOS]
    model = make_model()
    loss = train(model, [(prompt, target) for prompt in prompts(tokenizer, args.question)])
    model = model.to(torch.bfloat16)
    check(model, tokenizer, args.question, args.answer)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS, do_sample=False)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)
    for path in args.out.iterdir():
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o044)
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(json.dumps({"loss": loss, "seconds": round(time.monotonic() - start, 1), "bytes": size, "out": str(args.out)}))


if __name__ == "__main__":
    main()
