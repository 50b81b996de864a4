"""Indexes of tokens in C++, compiled for this machine at first use; each has a twin in Python."""
