"""An exact simulated kernel dirty log and guest, for proofs and for machines without KVM."""
