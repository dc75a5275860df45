"""Decode: a few queries a row, each over a dense range or over sink and local ranges."""
