"""The exported program in PyTorch: the engine, and how it rewrites, compiles and calls the program."""
