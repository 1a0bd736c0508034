"""The migration protocol without I/O: frames, limits, states and transitions of both sides."""
