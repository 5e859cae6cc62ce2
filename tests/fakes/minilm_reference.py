"""Embeddings of a MiniLM directory computed directly with transformers: run by the ENGINE environment's python, which has torch.

`python minilm_reference.py MODEL_DIR TEXT...` prints JSON: one unit vector per text (mean over tokens, then L2). Imports no project code.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch

torch.set_num_threads(1)

from transformers import AutoModel, AutoTokenizer  # noqa: E402


def main() -> None:
    """Mean pooling is what the directory's 1_Pooling says; it lists no normalisation, which servers add for a bi-encoder."""
    directory, *texts = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    vectors = []
    with torch.no_grad():
        for text in texts:
            batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(pooled, dim=1)[0].tolist())
    print(json.dumps({"texts": texts, "embeddings": vectors}))


if __name__ == "__main__":
    main()
