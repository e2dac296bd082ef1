"""Hashes that depend on their parts alone, not on process, platform or Python version."""

import hashlib
import json
from typing import Any


def stable_hash(*parts: Any) -> int:
    """A signed 64-bit hash of JSON values, the same in every process, for ever.

    Types count: 42 and "42" are different. Seeds of random generators are made of it, and ids.
    """
    text = json.dumps(parts, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
