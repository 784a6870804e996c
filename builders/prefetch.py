"""Work that is done ahead by threads while what came before is used; reads and writes nothing itself."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T, R = TypeVar("T"), TypeVar("R")


def prefetched(work: Callable[[T], R], items: Iterable[T], ahead: int = 1) -> Iterator[R]:
    """`work(item)` for every item, in order; the next ones are under way while one is used.

    Args:
        work: May release the interpreter's lock, else nothing is won.
        items: Read from this thread, no further than `ahead` items in advance.
        ahead: Items worked on at once, each by a thread; so many results and one more are held, at most.
    """
    coming = iter(items)
    with ThreadPoolExecutor(ahead) as pool:
        under_way = deque(pool.submit(work, item) for item in islice(coming, ahead))
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(pool.submit(work, item) for item in islice(coming, 1))
            yield result
