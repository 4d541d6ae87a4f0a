"""Serve accounts, transfers and a ledger on one database, and events on a second."""
