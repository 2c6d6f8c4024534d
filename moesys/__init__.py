"""moesys: distributed training of Mixture-of-Experts language models.

Importing this package costs nothing: every subpackage is imported where it is used.
"""

__version__ = "0.1.0"
