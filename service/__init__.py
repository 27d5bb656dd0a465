"""The gRPC service: contract to runtime events and back, admission, draining and the command line."""
