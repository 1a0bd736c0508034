"""The guest protocol: messages, server, client, descriptor passing."""
