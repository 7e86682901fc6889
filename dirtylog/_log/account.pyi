from collections.abc import Iterable, Sequence
from threading import RLock
from types import TracebackType
from typing import Any, final

from dirtylog._bits.pages import DirtyPages
from dirtylog._core import DirtyBitmap
from dirtylog.epochs import Observer
from dirtylog.log import Attachment, DirtyLog, Source

__all__ = ["Account", "Gathering", "Leaving", "Observing", "Share"]

@final
class Account:
    def __new__(cls, pending: DirtyBitmap) -> Account: ...
    @property
    def npages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def committed(self) -> int: ...
    @property
    def holder(self) -> Any | None: ...
    def add(self, pages: DirtyPages, first_page: int = 0) -> None: ...
    def add_range(self, first: int, count: int, exact: bool) -> None: ...
    def adopt(self, larger: DirtyBitmap) -> None: ...

class Gathering:
    _lock: RLock
    _sources: list[Attachment]
    _observers: list[Observer]
    _unsaid: list[str]
    _geometry: tuple[int, int]

class Observing:
    _log: DirtyLog
    _account: Account
    _closed: bool
    def _fitting(self) -> Account: ...
    def _begin(self, epoch: Leaving) -> Sequence[str]: ...
    def _check_open(self) -> None: ...
    def _check_free(self) -> None: ...

class Share:
    source: Source
    name: str
    first_page: int
    npages: int
    @property
    def _doubtful(self) -> bool: ...
    def _harvest(self, observers: Iterable[Observing]) -> str | None: ...
    def _report_everything(self, observers: Iterable[Observing]) -> None: ...
    def _after_fork(self) -> None: ...

class Leaving:
    _observer: Observer
    _pages: DirtyPages | None
    _number: int
    _patience: float
    _deadline: float
    @property
    def owner(self) -> str: ...
    def __new__(cls, observer: Observing, owner: str = "", patience: float = ...) -> Leaving: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def _leave(self, delivered: bool) -> None: ...
