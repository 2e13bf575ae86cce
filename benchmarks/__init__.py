"""The README's claims, one file each: run by ``python benchmarks/NAME.py``, some also by ``trimtab bench``."""
