"""How much GPU memory a profile needs: weights, KV cache, overhead, per GPU; pure arithmetic on the facts that the profile carries.

Overhead, and the part of the weights that each GPU of a group holds again, are estimates: docs/operations.md says so where it explains the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from artifact.profile import Memory, Profile
from runtime import precision

GIB = 1 << 30
OVERHEAD = 2 * GIB  # activations, CUDA context and graphs, NCCL
REPLICATED = 0.04  # of the weights, what every GPU of a group holds again (norms, KV heads)
BLOCK = 16  # tokens: a sequence takes whole blocks of the KV cache
HEADROOM = 0.1  # of the budget: less left for the KV cache than this is worth a warning
NO_FACTS = "the KV cache is not counted: the profile has no memory facts"


@dataclass(frozen=True)
class Need:
    """Bytes per GPU: weights, KV cache of `sequences` of `length` tokens each, overhead; `gpus` is tp x pp.

    `per_token` and `fixed` describe the KV cache of one sequence: bytes for each token, and bytes of sliding windows that are full.
    """

    gpus: int
    weights: int
    overhead: int
    length: int = 0
    sequences: int = 1
    per_token: int = 0
    per_token_window: int = 0
    window: int = 0

    @property
    def counted(self) -> bool:
        """Whether the KV cache is part of the estimate."""
        return bool((self.per_token or self.per_token_window) and self.length)

    @property
    def kv(self) -> int:
        """Bytes of KV cache for what is wanted."""
        return self.sequences * self.kv_of(self.length) if self.counted else 0

    @property
    def least(self) -> int:
        """Bytes without any KV cache."""
        return self.weights + self.overhead

    @property
    def total(self) -> int:
        """Bytes for what is wanted."""
        return self.least + self.kv

    def kv_of(self, length: int) -> int:
        """Bytes of KV cache of one sequence of so many tokens."""
        blocks = -(-length // BLOCK) * BLOCK
        return blocks * self.per_token + min(blocks, -(-self.window // BLOCK) * BLOCK if self.window else blocks) * self.per_token_window

    def longest(self, budget: float) -> int:
        """The largest length, in tokens, of `sequences` sequences that a budget in bytes leaves room for; whole blocks, at most `length`."""
        low, high = 0, -(-self.length // BLOCK)
        while low < high:
            middle = (low + high + 1) // 2
            if self.least + self.sequences * self.kv_of(middle * BLOCK) <= budget:
                low = middle
            else:
                high = middle - 1
        return min(low * BLOCK, self.length)

    def words(self) -> str:
        """The sum in words: `15.0 GiB weights + 16.0 GiB KV (1 x 131072 tokens) + 2.0 GiB overhead`."""
        over = f" (1/{self.gpus} and {REPLICATED:.0%})" if self.gpus > 1 else ""
        kv = f" + {gib(self.kv)} GiB KV ({self.sequences} x {self.length} tokens)" if self.counted else ""
        return f"{gib(self.weights)} GiB weights{over}{kv} + {gib(self.overhead)} GiB overhead"


def need(profile: Profile, tp: int, pp: int, *, length: int = 0, sequences: int = 1) -> Need | None:
    """The need of a profile over tp x pp GPUs for sequences of `length` tokens (0: its option, else the model's context); None: not told."""
    facts = profile.memory or Memory()
    if profile.options.get("kv_cache_dtype", "").startswith("fp8"):
        facts = replace(facts, kv_bytes=1)
    elif precision.named(profile.options.get("dtype") or profile.tags.get("precision", "")) == "fp32":
        facts = replace(facts, kv_bytes=4)
    stored = facts.weights_bytes or profile.weights_bytes
    if not stored:
        return None
    gpus = tp * pp
    weights = math.ceil(stored / gpus * (1 + REPLICATED)) if gpus > 1 else stored
    # Of more digits than any model has tokens only the first count: the document is from outside, and the sum is refused either way.
    wanted = length or int(profile.options.get("max_model_len", "")[:12] or 0) or facts.context
    each = _layer(facts, tp)
    return Need(
        gpus,
        weights,
        OVERHEAD,
        wanted,
        sequences,
        -(-facts.layers // pp) * each,
        -(-facts.sliding_layers // pp) * each,
        facts.window,
    )


def _layer(facts: Memory, tp: int) -> int:
    """Bytes of KV cache of one token in one layer on one GPU: heads are replicated where there are fewer than GPUs, a latent always is."""
    if facts.latent:
        return facts.latent * facts.kv_bytes
    return 2 * max(1, -(-facts.kv_heads // tp)) * facts.head_dim * facts.kv_bytes if facts.kv_heads else 0


def gib(value: float) -> str:
    """`15.0`, of bytes."""
    return f"{value / GIB:.1f}"
