"""Live migration of real KVM guests, as an asyncio pipeline."""
