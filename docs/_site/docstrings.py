"""How the reference shows our docstrings: what stands under ``Example:`` is code."""

import textwrap
from typing import Any

from griffe import Extension, Object

SECTION = "\nExample:\n"


class ExamplesAreCode(Extension):
    """Put a fence around the example of every docstring."""

    def on_object(self, *, obj: Object, **options: Any) -> None:
        """Look at one object's docstring, which has its example last."""
        if obj.docstring is None or SECTION not in obj.docstring.value:
            return
        text, _, example = obj.docstring.value.partition(SECTION)
        code = textwrap.indent(textwrap.dedent(example).strip(), "    ")
        obj.docstring.value = f"{text}{SECTION}    ```python\n{code}\n    ```"
