"""crc32 of a member, the same from both: isal takes a quarter of zlib's time, and is not to be had on every machine."""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
