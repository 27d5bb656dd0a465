"""The contract of the service; `v1` holds the messages and stubs generated from its `.proto` files."""
