# Types for annotations: a stub alone, since nothing of it exists while a program runs.

from typing import Any, TypeAlias

import numpy.typing as npt
from typing_extensions import Buffer

# What has memory. On Python 3.11 a checker does not see that an array is a buffer.
Memory: TypeAlias = Buffer | npt.NDArray[Any]
