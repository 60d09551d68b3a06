"""How frames reach expert actors: streams held open, or Ray calls."""
