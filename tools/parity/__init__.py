"""Compares this trainer with recorded values of the reference, quantity by quantity (tools/check_parity.py)."""
