"""KVM as the kernel offers it: the ABI, the one place that calls ioctl, and handles for system, VM and vCPU."""
