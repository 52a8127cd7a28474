"""The studies: grids of cells, each computed once, by as many processes as work on them."""
