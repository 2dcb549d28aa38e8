"""Bridges to other frameworks, one module each. Importing one changes nothing until its functions are called."""
