"""Print a hash of the logits of a prompt and of generated tokens, for test_identity.py.

Usage: print_logits.py MODEL CACHE_TYPE FLASH_ATTENTION [attach]
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np

from session import STOCK, Session


def main() -> None:
    """Read a prompt in two batches (tokens, embeddings, tokens), then generate 64 tokens."""
    model, cache_type, flash_attention, *attach = sys.argv[1:]
    rng = np.random.default_rng(3)
    with Session(
        model,
        merge={} if attach else None,
        cache_type=cache_type,
        flash_attention=flash_attention == "True",
    ) as session:
        all_logits = [session.decode(rng.integers(0, session.n_vocab, 90).tolist())]
        picture = rng.standard_normal((64, session.n_embd)).astype(np.float32)
        all_logits.append(session.decode(embeddings=picture))
        all_logits.append(session.decode(rng.integers(0, session.n_vocab, 300).tolist()))
        all_logits += session.generate(all_logits[-1], 64)
        digest = hashlib.sha256(np.array(all_logits, np.float32).tobytes()).hexdigest()
        tokens = [int(np.argmax(logits)) for logits in all_logits]
    print("stock" if STOCK else "ours", digest, len(set(tokens)))


if __name__ == "__main__":
    main()
