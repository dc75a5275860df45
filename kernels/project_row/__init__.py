"""The linear layers of a single token."""
