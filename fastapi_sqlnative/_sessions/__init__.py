"""The sessions, which track their own work, and how they are finished."""
