"""Accounts, transfers and a ledger in one database, and events in a second."""
