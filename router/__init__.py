"""Router and gateway: from a request to tokens, through the expert actors."""
