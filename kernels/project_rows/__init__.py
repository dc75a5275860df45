"""The linear layers of a single token, or of the few tokens of a batch's step."""
