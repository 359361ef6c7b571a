"""torchrun's error file: why a rank failed, for whoever looks at the job."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import traceback
from typing import Any, Callable, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def record(function: F) -> F:
    """A main function whose exception is also written to `TORCHELASTIC_ERROR_FILE`, as torchrun's own `record` does."""

    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except Exception as error:
            path = os.environ.get("TORCHELASTIC_ERROR_FILE")
            if path:
                about = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
                message = {"message": f"{type(error).__name__}: {error}", "extraInfo": about}
                with contextlib.suppress(OSError), open(path, "w", encoding="utf-8", errors="replace") as file:
                    json.dump({"message": message}, file)
            raise

    return wrapped  # type: ignore[return-value]
