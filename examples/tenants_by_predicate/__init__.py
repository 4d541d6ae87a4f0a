"""Tenants in one database, separated by a predicate on every query."""
