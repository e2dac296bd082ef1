"""Seeds that depend on their parts alone: not on the process, the platform or the Python version."""

from hashlib import blake2b


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) from integers and strings; order and types matter."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
