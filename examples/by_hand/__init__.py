"""Controlling the transaction by hand: its end, a row lock, savepoints."""
