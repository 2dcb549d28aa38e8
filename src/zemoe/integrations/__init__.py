"""Bridges to other frameworks, one package each. Importing one changes nothing until its functions are called."""
