"""ssm-vlm: which vision encoder should a vision-language model use?

Importing this package registers every model with the Transformers Auto classes and does nothing else.
"""

__version__ = "0.1.0"
