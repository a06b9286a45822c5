"""Files and folders of weights for your own scripts: read one, and check that it is undamaged."""

from twa.files.formats import load, verify

__all__ = ["load", "verify"]
