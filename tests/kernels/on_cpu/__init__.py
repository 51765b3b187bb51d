"""CUDA kernels run on a CPU: an emulator of what kernels may use, to be read from machine.h."""
