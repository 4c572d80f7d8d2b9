"""Calls of kernels, recorded once and made again without Python: what a CUDA graph is for a GPU."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _backends

if TYPE_CHECKING:
    from typing_extensions import Self


class Recording:
    """The calls of this package's operations inside `with recording:`, to be made again by `replay()`.

    A decode step of a transformer is some hundred calls of a few microseconds each, and what surrounds them in Python
    takes longer than that. They are the same for every token but for the contents of a few tensors. So: run the step
    once inside the recording, on inputs that stay (buffers); for each following token write the new inputs into these
    buffers and replay. The results appear in the tensors that the first run returned.

    A replay reads and writes the very memory of the first run: tensors that a recorded call saw are kept alive with the
    recording. Shapes, strides and plain numbers (eps, scale) are those of the first run; what changes must be in a
    tensor, for example the `lengths` of `append_kv` and the `key_lengths` of `attention`.

    Only CPU kernels of this package are recorded. An operation that would run on another backend raises; but torch's
    own operations are not seen: inside, use them only for views, never to compute what a recorded call reads. Calls of
    other threads are not recorded. Scratch memory is shared with this thread's other calls, so replay on the thread
    that recorded.

    Raises:
        RuntimeError: no CPU kernels run on this machine; inside, an operation runs on another backend, or another
            recording is under way.

    >>> x, weight = torch.ones(1, 4), torch.ones(4)
    >>> with Recording() as step:
    ...     y = rms_norm(x, weight, 0.0)
    >>> _ = x.copy_(torch.tensor([[2.0, 0.0, 0.0, 0.0]]))
    >>> step.replay()
    >>> y
    tensor([[2., 0., 0., 0.]])
    """

    def __init__(self) -> None:
        native = next((name for name in _backends.available_backends() if name.startswith("cpu")), None)
        if native is None:
            raise RuntimeError(f"Recording: no CPU kernels run here: {_backends.unavailable('cpu_avx2')}")
        # Every ISA's module has recordings of its own; a forced backend may be the other one.
        forced = _backends._forced or native
        self._calls: Any = _backends.module(forced if forced.startswith("cpu") else native, "").Recording()

    @staticmethod
    def is_possible() -> bool:
        """Whether CPU kernels run on this machine, and none other is forced."""
        forced = _backends._forced
        return any(name.startswith("cpu") and forced in (None, name) for name in _backends.available_backends())

    def __enter__(self) -> Self:
        self._calls.begin()
        _backends._recording.active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.end()
        _backends._recording.active = False

    def __len__(self) -> int:
        """The number of recorded calls."""
        return len(self._calls)

    def replay(self) -> None:
        """Makes all calls again, in their order."""
        self._calls.replay()
