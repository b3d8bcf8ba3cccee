"""Other servers behind the same front: each request goes to one that holds its adapter."""
