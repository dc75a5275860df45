"""Bringing one truth value to the host while the device goes on working."""
