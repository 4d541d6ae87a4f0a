"""SQLite in a file, for `async def` and `def`, with foreign keys and real transactions."""
