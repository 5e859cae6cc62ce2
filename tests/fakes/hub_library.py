"""What transformers and sentence-transformers read of a repository by its id: `python hub_library.py WHAT REPO TEXT…` prints RESULT and JSON.

Run by the engine environment's python; imports no project code.
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def config(repo: str, *_: str) -> object:
    """The kind of model that AutoConfig finds."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(repo).model_type


def tokens(repo: str, *texts: str) -> object:
    """What AutoTokenizer makes of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repo)
    return [tokenizer(text)["input_ids"] for text in texts]


def sentences(repo: str, *texts: str) -> object:
    """The unit vectors that SentenceTransformer gives."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(repo, device="cpu")
    return [[float(x) for x in vector] for vector in model.encode(list(texts), normalize_embeddings=True)]


def push(repo: str, folder: str, *_: str) -> object:
    """push_to_hub of a model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(folder).push_to_hub(repo, private=True)
    AutoTokenizer.from_pretrained(folder).push_to_hub(repo)
    return "pushed"


if __name__ == "__main__":
    what, repo, *texts = sys.argv[1:]
    found = {"config": config, "tokens": tokens, "sentences": sentences, "push": push}[what](repo, *texts)
    print("RESULT " + json.dumps(found))
