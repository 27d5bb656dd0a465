"""Version 1 of the contract: generated code, see the `.proto` files beside it (`make proto`)."""
