"""Anomalies of concurrent transactions, and how to prevent them."""
