"""Doing it: compute, write, put in place, read back, describe, and tell the user."""
