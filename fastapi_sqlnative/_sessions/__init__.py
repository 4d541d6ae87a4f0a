"""The sessions, which track their own work, and how they are finished.

`session` is the only way to the database, `record` tracks what went through it, `factory` makes
the sessions of one database, and `finishing` commits, rolls back and closes them.
"""
