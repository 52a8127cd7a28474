"""The pencil of two Fisher matrices, its eigenpairs, and the filters that select by them."""
