"""What is found in the place of torch where no test needs it: see tests/conftest.py."""

raise ImportError("tests that are not marked `parity` do without torch")
