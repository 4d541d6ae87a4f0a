"""Tenants in one database, kept apart by a predicate that every query gets."""
