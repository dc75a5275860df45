"""Decode: one query a row, over a dense range or over sink and local ranges."""
