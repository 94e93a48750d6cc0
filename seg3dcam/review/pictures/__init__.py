"""Write pictures of a case, each kind in a module of its own."""
