"""`zemoe generate`: a model writes text, and each token shows how many FFN experts it used."""
