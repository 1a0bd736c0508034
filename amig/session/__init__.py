"""The two sides of one migration: handshake, pipeline, handover."""
