"""The lifecycle of an application's databases: installation, start-up, checks, shutdown."""
