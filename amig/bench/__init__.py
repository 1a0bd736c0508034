"""Benches that anybody can run again: the published dirty-log scenario, and lost and needless pages on real KVM."""
