"""Doors to other code: one file a peer."""
