"""This trainer beside recorded values of the reference, quantity by quantity (tools/check_parity.py)."""
