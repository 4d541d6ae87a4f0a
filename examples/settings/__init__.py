"""An engine built from settings: built once, disposed of once."""
