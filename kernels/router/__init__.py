"""Deciding the rows' routes: the router's pooling and MLP in a few launches."""
