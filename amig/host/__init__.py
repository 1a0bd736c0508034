"""The guest host: memory, boot, vCPU threads, devices, and the durable handover record."""
