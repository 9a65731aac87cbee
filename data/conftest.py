"""The fixtures of test_nalora.py, for the tests of data/."""
from test_nalora import base, one_thread, random_base, uninterrupted

__all__ = ["base", "one_thread", "random_base", "uninterrupted"]
