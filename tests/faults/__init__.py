"""What goes wrong around the compiler: damaged files, killed saves, threads, memory, PyTorch."""
