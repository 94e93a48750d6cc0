"""Write volumes and masks in formats of other programs, each format in a module of its own."""
