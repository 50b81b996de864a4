"""C++ kernels for CPUs, built once with the machine's own compiler; without one, torch serves."""
