"""Demonstrations on disk: HDF5 files in LIBERO's layout, what they are of, and what is made of them once."""
