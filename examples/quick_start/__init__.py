"""The smallest application: one table, one session, three endpoints."""
