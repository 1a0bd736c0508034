"""What carries frames: tcp, unix, file."""
