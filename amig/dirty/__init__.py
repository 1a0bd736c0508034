"""Dirty logging: strategies, and the hub that owns GET and CLEAR for many users."""
