"""The engine room: sessions that know what they have done, and how they are finished.

`session` is the only way to the database, `record` what it has let through, `factory` what the
sessions of one database share, and `finishing` where they end.
"""
