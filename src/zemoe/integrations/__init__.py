"""zemoe's layers inside of other frameworks: a package for each, and `engines`, which vLLM's and SGLang's share.

Importing such a package changes nothing in its framework. Its functions do: `apply`, `patch_` and `register` for
transformers, and `register` for vLLM and SGLang, which those call by themselves where zemoe is installed.
"""
