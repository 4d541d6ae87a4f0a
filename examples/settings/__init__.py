"""An engine out of settings: built once, disposed of once."""
