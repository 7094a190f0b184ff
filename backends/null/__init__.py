"""The null backend: renders every kernel, runs nothing, needs no tools."""
