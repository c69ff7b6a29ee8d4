"""How weights get from a trainer to the servers that sample from them."""
